"""The memory of a start with sharded weights: each process holds its share, never the whole model.

Memory is what Linux counts as anonymous: mapped files are not in it. 300 million parameters take
1.2 GB in float32.
"""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from modern_llm.config import ModernLLMConfig, TrainingConfig
from modern_llm.distributed import sharded_start
from modern_llm.distributed.freed_memory import large_blocks_apart, release_freed_memory
from modern_llm.models.load import Checkpoint, load_model, make_scorer
from tests.helpers.models import make_model
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_tokenizer
from tests.helpers.zero import stage, use_deepspeed

SHAPE = {
    "vocab_size": 8192, "d_model": 1024, "n_layers": 17, "n_heads": 16, "ffn_hidden_size": 4096,
    "max_seq_len": 256, "tie_embeddings": False,
}  # fmt: skip
PARAMETERS = 302_025_728
CPU = {"device": "cpu"}
ROOM = 300e6


@dataclass(frozen=True)
class Case:
    """What is loaded, how, and whether an engine with its optimizer is made too."""

    kind: str = "policy"
    file: str = "float32"
    precision: str = "no"
    options: dict[str, Any] = field(default_factory=dict)
    engine: bool = False
    export: bool = False


CASES = {
    # Name: (processes, what they load one after another)
    "kinds": (
        2,
        {
            "new": Case("new"),
            "pt": Case(file="model.pt"),
            "float32 to bfloat16": Case(precision="bf16"),
            "resumed": Case("resumed"),
            "lora": Case("lora"),
            "reference, bfloat16 to float32": Case("frozen", "bfloat16"),
        },
    ),
    "engine": (2, {"parts": Case(engine=True, export=True)}),
    "offload": (
        2,
        {"parts": Case(options={"offload_optimizer": CPU, "offload_param": CPU}, engine=True)},
    ),
    "four": (4, {"parts": Case()}),
}


class Peak:
    """Largest anonymous memory of this process since the object was made, above that at first."""

    def __init__(self) -> None:
        self._first = self._most = anonymous()
        self._on = True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._on:
            self._most = max(self._most, anonymous())
            time.sleep(0.005)

    def bytes(self) -> int:
        return max(self._most, anonymous()) - self._first

    def stop(self) -> int:
        self._on = False
        return self.bytes()


def anonymous() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no line Anonymous")


def measured(cases: dict[str, Case], stored: dict[str, Path], folder: Path) -> dict[str, dict]:
    """On one rank: load and shard each case; return the peaks, and a sum of all weights."""
    found = {}
    for name, case in cases.items():
        began = time.perf_counter()
        found[name] = start(case, stored, folder)
        print(name, found[name], f"{time.perf_counter() - began:.0f} s", flush=True)
    return found


def start(case: Case, stored: dict[str, Path], folder: Path) -> dict[str, float]:
    import deepspeed
    import peft  # noqa: F401

    from modern_llm.config import LoraConfig
    from modern_llm.distributed import runtime as runtimes
    from modern_llm.export.final_model import export
    from modern_llm.models.build_later import build_model_later
    from modern_llm.models.load import inspect_checkpoint
    from modern_llm.models.run_checkpoint import load_weights
    from modern_llm.setup.policy import set_up_policy
    from modern_llm.setup.scorers import set_up_frozen, set_up_scorer
    from modern_llm.training.optimizers import make_optimizer

    use_deepspeed(stage(3, **case.options), folder)
    config = TrainingConfig(
        run_name="x", output_dir=folder, batch_size=8, max_steps=2, mixed_precision=case.precision,
        attention="separate",  # a shorter probe
    )  # fmt: skip
    gc.collect()
    release_freed_memory()
    with runtimes.start(config) as runtime:
        found: dict[str, float] = {}
        peak, place = Peak(), stored[case.file]
        if case.kind == "new":
            model = build_model_later(ModernLLMConfig(**SHAPE), seed=0)
            scorer = set_up_scorer(runtime, model, config, dropout=True)
        elif case.kind == "frozen":
            scorer = set_up_frozen(runtime, inspect_checkpoint(place), config)
        else:
            lora = LoraConfig() if case.kind == "lora" else None
            scorer = set_up_policy(runtime, inspect_checkpoint(place), config, lora, dropout=False)
        if case.kind == "resumed":
            load_weights(stored["run"], scorer.model)
        if case.kind == "frozen":
            runtime.freeze(scorer)
        elif case.engine:
            optimizer = make_optimizer(config, scorer)
            real = sharded_start.shard_for_zero3

            def noted(*args: Any) -> None:
                real(*args)
                found["weights"] = peak.bytes()

            sharded_start.shard_for_zero3 = noted
            try:
                engine = runtime.prepare(scorer, optimizer)
            finally:
                sharded_start.shard_for_zero3 = real
            found["start"] = peak.bytes()
            if case.export:
                release_freed_memory()
                writing = Peak()
                tokenizer = AutoTokenizer.from_pretrained(stored["tokenizer"])
                with large_blocks_apart():
                    export(runtime, engine, tokenizer, folder / "final")
                found["export"] = writing.stop()
        else:
            sharded_start.shard_for_zero3(scorer, runtime.deepspeed_content, runtime.device)
        found.setdefault("weights", peak.bytes())
        peak.stop()
        total = 0.0
        for parameter in scorer.parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                total += float(parameter.detach().double().sum())
    return {**found, "sum": total}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    from safetensors.torch import save_file

    from modern_llm.models import pt_checkpoint
    from modern_llm.models.build import build_model

    root, shape = tmp_path_factory.mktemp("stored"), ModernLLMConfig(**SHAPE)
    model = build_model(shape, seed=0)
    assert model.num_parameters() == PARAMETERS
    model.save_pretrained(root / "float32", max_shard_size="500MB")
    pt_checkpoint.save_model(root / "model.pt", shape, model)
    # As a run saves it, without its optimizer's state.
    run = root / "run"
    run.mkdir()
    save_file({n: p.data for n, p in model.named_parameters()}, run / "model.safetensors")
    model.to(torch.bfloat16).save_pretrained(root / "bfloat16")
    make_tokenizer(root / "tokenizer")
    return {path.name: path for path in root.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", CASES)
def test_no_process_holds_more_than_its_share(tmp_path, stored, group):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    world, cases = CASES[group]
    ranks = run_ranks(measured, world, cases, stored, tmp_path, timeout=800)
    for name, case in cases.items():
        size = 2 if case.precision == "bf16" else 4
        share = PARAMETERS * size / world
        # Weights, float32 master weights, gradients and two moments.
        trained = PARAMETERS * (size + 4 + 4 + 8) / world
        sums = {rank[name].pop("sum") for rank in ranks}
        assert len(sums) == 1 and 0.0 not in sums
        print(name, f"share {share / 1e6:.0f} MB", *(
            " ".join(f"{key} {value / 1e6:.0f}" for key, value in rank[name].items())
            for rank in ranks
        ))  # fmt: skip
        for rank in ranks:
            assert rank[name]["weights"] < 1.35 * share + ROOM, name
            assert rank[name].get("start", 0) < 1.35 * trained + ROOM, name
            # Gathered parameters and buffers of gloo; less than half of the model.
            assert rank[name].get("export", 0) < PARAMETERS * 4 / 2, name
    if group == "engine":
        written, read = (
            load_file(p / "model.safetensors") for p in (tmp_path / "final", stored["run"])
        )
        assert set(written) == set(read)
        assert all(torch.equal(written[name], tensor) for name, tensor in read.items())


def under_fsdp(cases: list[tuple[Path, str, bool]]) -> list[dict[str, Any]]:
    """On one rank: shard each (checkpoint, precision, frozen) with FSDP2 over gloo.

    Accelerate starts FSDP2 only on GPUs, so this calls its preparation of a model directly.
    """
    import os

    os.environ |= {
        "FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true",
    }  # fmt: skip
    torch.distributed.init_process_group("gloo")
    return [fsdp_start(*case) for case in cases]


def fsdp_start(place: Path, precision: str, frozen: bool) -> dict[str, Any]:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.tensor import DTensor

    from modern_llm.distributed import frozen_engine, fsdp
    from modern_llm.models.load_later import load_model_later
    from modern_llm.models.unread import first_layers

    config = TrainingConfig(run_name="x", output_dir=place, mixed_precision=precision)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=fsdp.plugin(config)), mixed_precision=precision,
        torch_device_mesh=None, device=torch.device("cpu"), is_main_process=False,
    )  # fmt: skip
    gc.collect()
    release_freed_memory()
    peak = Peak()
    with large_blocks_apart():
        model = load_model_later(Checkpoint(str(place), AutoConfig.from_pretrained(place), False))
        scorer = make_scorer(model, lean=False, measured=first_layers(model))
    if frozen:
        frozen_engine.shard_by_fsdp(accelerator, scorer, precision)
    else:
        readers = sharded_start.take_readers(scorer)
        sharded_start.refuse_unread(scorer)
        fsdp2_prepare_model(accelerator, scorer)
        sharded_start.fill(scorer, readers)
    most = peak.stop()
    assert all(isinstance(parameter, DTensor) for parameter in scorer.parameters())
    stored = {parameter.to_local().dtype for parameter in scorer.parameters()}
    total = 0.0
    for name, parameter in scorer.named_parameters():  # before the forward: FSDP keeps some whole
        whole = parameter.full_tensor().detach()
        total += float(whole.double().sum())
        if name == "model.model.norm.weight":
            norm = whole.clone()
    sums = logprobs(scorer)
    if frozen:
        frozen_engine.release_frozen(scorer)
        assert all(parameter.device.type == "meta" for parameter in scorer.parameters())
    return {"weights": most, "sum": total, "sums": sums, "stored": stored, "norm": norm}


def logprobs(scorer: Any) -> torch.Tensor:
    """Log-probs of three tokens of two rows."""
    ids = torch.arange(24).view(2, 12)
    segments = torch.zeros(2, 12, 2, dtype=torch.long)
    segments[1, :, 0] = 1
    targets = torch.tensor([[1, 5, 15], [7, 8, 9]])
    with torch.no_grad():
        return scorer(ids, torch.arange(12).expand(2, 12), segments, targets).logprobs


@pytest.mark.slow
def test_fsdp_computes_with_the_weights_of_the_file(tmp_path):
    """Tied embeddings, stacked experts, and several rotary tables."""
    models = {name: make_model(name) for name in ("llama_tied", "mixtral", "gemma3")}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    cases = [(tmp_path / name, "no", frozen) for name in models for frozen in (True, False)]
    ranks = run_ranks(under_fsdp, 2, cases, timeout=400)
    for at, (place, _, _) in enumerate(cases):
        model = models[place.name]
        norm = model.model.norm.weight.detach()
        total = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
        expected = logprobs(make_scorer(load_model(place), lean=False))
        for found in (rank[at] for rank in ranks):
            assert found["sum"] == pytest.approx(total, rel=1e-9, abs=1e-9)
            assert torch.equal(found["norm"], norm)
            torch.testing.assert_close(found["sums"], expected, rtol=1e-5, atol=1e-5)
            assert found["stored"] == {torch.float32}


@pytest.mark.slow
def test_no_process_holds_more_than_its_share_under_fsdp(stored):
    """A policy in float32, and a frozen model in bfloat16."""
    cases = [(stored["float32"], "no", False), (stored["float32"], "bf16", True)]
    shares = [PARAMETERS * 4 / 2, PARAMETERS * 2 / 2]
    for rank in run_ranks(under_fsdp, 2, cases, timeout=400):
        for found, share in zip(rank, shares, strict=True):
            print(f"FSDP2: share {share / 1e6:.0f} MB, {found['weights'] / 1e6:.0f} MB")
            assert found["weights"] < 1.35 * share + ROOM
        assert [found["stored"] for found in rank] == [{torch.float32}, {torch.bfloat16}]
