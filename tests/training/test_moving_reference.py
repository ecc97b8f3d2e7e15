"""TR-DPO: a run whose reference follows the policy equals a plain loop with two models."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modern_llm.cli import main
from modern_llm.config import LoraConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.distributed.shutdown import signals
from modern_llm.models.adapters import add_adapters
from modern_llm.training.tasks import moving_reference
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.plain_dpo import encoded, sums
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

BATCH, SEED, LENGTH, STEPS = 8, 7, 64, 14
PAIRS = 45
"""Six steps an epoch, the last of them short."""


@dataclass(frozen=True)
class Case:
    """A run and the settings that the plain loop shares with it."""

    every: int
    alpha: float
    lora: LoraConfig | None = None
    rate: float = 1e-3
    dpo: dict[str, Any] = field(default_factory=dict)


WINDOWS, ADAPTERS = "windows that end within and after an epoch", "adapters"
CASES = {
    WINDOWS: Case(4, 0.6),
    "windows longer than an epoch": Case(9, 1.0),
    "every step": Case(1, 0.25),
    ADAPTERS: Case(4, 0.6, LoraConfig(rank=4), 1e-2),
}


@dataclass(frozen=True)
class Files:
    checkpoint: Path
    pairs: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("moving")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    return Files(checkpoint, write_jsonl(folder / "pairs.jsonl", transcripts(PAIRS)))


def plain_loop(files: Files, case: Case) -> list[float]:
    """Two models side by side; after every `every` steps the second is mixed with the first."""
    policy = AutoModelForCausalLM.from_pretrained(files.checkpoint, dtype=torch.float32)
    if case.lora is not None:
        add_adapters(policy, case.lora, str(files.checkpoint), seed=SEED)
    reference = copy.deepcopy(policy)
    pairs, losses = encoded(files.checkpoint, files.pairs, LENGTH), []
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=case.rate, betas=(0.9, 0.95), weight_decay=0.0)
    per_epoch = math.ceil(len(pairs) / BATCH)
    for step in range(STEPS):
        epoch, within = divmod(step, per_epoch)
        key = np.array([SEED, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(pairs))
        batch = [pairs[i] for i in order[within * BATCH : (within + 1) * BATCH]]
        with torch.no_grad():
            frozen = sums(reference, batch)
        ratios = sums(policy, batch) - frozen
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % case.every == 0:
            with torch.no_grad():
                for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
                    old.mul_(1 - case.alpha).add_(new, alpha=case.alpha)
    return losses


def our_run(files: Files, case: Case, folder: Path, **train: Any) -> list[float]:
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": case.rate, "schedule": "constant", "weight_decay": 0.0, "log_every": 1,
        "seed": SEED, "tokens_per_micro_batch": 300, "save_every": 1000,
    }  # fmt: skip
    moving = {"reference_sync_every": case.every, "reference_mixup": case.alpha}
    run_dpo(
        files.checkpoint,
        TrainingConfig(**(fields | train)),
        DPOConfig(max_length=LENGTH, **moving, **case.dpo),
        PreferenceDatasetConfig(dataset_name=str(files.pairs)),
        lora_config=case.lora,
    )
    return losses(folder)


def losses(folder: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in lines if name in record]


def near(found: list[float], expected: list[float], within: float = 1e-5) -> None:
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - np.array(expected)).max() < within


@pytest.mark.parametrize(
    "name", [n if n == ADAPTERS else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_a_run_equals_a_plain_loop_with_two_models(name, files, tmp_path):
    case = CASES[name]
    expected = plain_loop(files, case)
    near(our_run(files, case, tmp_path), expected)
    # It must matter that the reference moves.
    frozen = plain_loop(files, Case(STEPS, case.alpha, case.lora, case.rate))
    assert frozen[: case.every] == expected[: case.every]
    assert max(abs(a - b) for a, b in zip(frozen, expected, strict=True)) > 5e-3


def test_a_copied_policy_is_its_own_reference(files, tmp_path):
    found = our_run(files, Case(3, 1.0), tmp_path)
    at = list(range(0, STEPS, 3))
    assert [found[i] for i in at] == pytest.approx([math.log(2)] * len(at), abs=1e-6)
    assert all(abs(found[i] - math.log(2)) > 1e-4 for i in range(STEPS) if i not in at)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "background"),
    [
        (WINDOWS, False),
        (WINDOWS, True),
        (ADAPTERS, False),
    ],
)
def test_a_resumed_run_is_bitwise_the_run_without_a_break(name, background, files, tmp_path):
    case = CASES[name]
    settings = {"save_every": 3, "background_saving": background}
    whole = our_run(files, case, tmp_path / "whole", **settings)
    for step in (3, 5, 8, 13):  # in the first window, in later ones, and where one begins
        with broken_at(step), pytest.raises(KeyboardInterrupt):
            our_run(files, case, tmp_path / "broken", **settings)
    assert our_run(files, case, tmp_path / "broken", **settings) == whole
    kind = "adapter_model" if case.lora else "model"
    one, other = (
        load_file(tmp_path / part / "x_final" / f"{kind}.safetensors")
        for part in ("whole", "broken")
    )
    assert all(torch.equal(one[n], other[n]) for n in one) and set(one) == set(other)


def test_a_dry_run_does_the_first_step(files, tmp_path, capsys):
    command = ["dpo", "--sft_checkpoint", str(files.checkpoint), "--train.run_name", "x"]
    command += ["--data.dataset_name", str(files.pairs), "--train.output_dir", str(tmp_path / "r")]
    command += ["--train.batch_size", "4", "--train.max_steps", "9", "--dpo.max_length", "64"]
    assert main([*command, "--dpo.reference_sync_every", "2", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 9


@pytest.mark.slow
def test_weights_in_halves_move_and_resume_bitwise(files, tmp_path):
    halves = {"weights": "bfloat16", "mixed_precision": "bf16", "save_every": 3}
    whole = our_run(files, CASES[WINDOWS], tmp_path / "whole", **halves)
    with broken_at(8), pytest.raises(KeyboardInterrupt):
        our_run(files, CASES[WINDOWS], tmp_path / "broken", **halves)
    assert our_run(files, CASES[WINDOWS], tmp_path / "broken", **halves) == whole
    near(whole, plain_loop(files, CASES[WINDOWS]), within=0.02)
    at = [3, 6, 9]  # a policy that has just been copied is its own reference, also when split
    copied = our_run(files, Case(3, 1.0), tmp_path / "copied", **halves)
    assert [copied[i] for i in at] == pytest.approx([math.log(2)] * 3, abs=5e-3)


@pytest.mark.slow
def test_weights_in_halves_resume_exactly(files, tmp_path):
    low = {"mixed_precision": "bf16", "weights": "bfloat16", "save_every": 3}
    whole = our_run(files, CASES[WINDOWS], tmp_path / "whole", **low)
    near(whole, plain_loop(files, CASES[WINDOWS]), 0.05)
    with broken_at(8), pytest.raises(KeyboardInterrupt):
        our_run(files, CASES[WINDOWS], tmp_path / "broken", **low)
    assert our_run(files, CASES[WINDOWS], tmp_path / "broken", **low) == whole


@pytest.mark.slow
def test_a_stop_while_a_window_is_scored_resumes_exactly(files, tmp_path, monkeypatch):
    case = CASES[WINDOWS]
    whole = our_run(files, case, tmp_path / "whole")
    real, calls = moving_reference.check, []

    def heard(runtime, state):
        calls.append(state)
        if len(calls) == 3:
            runtime.stopping = "SIGTERM"
        real(runtime, state)

    monkeypatch.setattr(moving_reference, "check", heard)
    with pytest.raises(signals.Stopped, match="after step 4, saved"):
        our_run(files, case, tmp_path / "stopped")
    monkeypatch.undo()
    assert our_run(files, case, tmp_path / "stopped") == whole


@pytest.mark.slow
def test_evaluations_keep_the_first_reference(files, tmp_path):
    def evaluated(folder: str, **moving: Any) -> list[float]:
        config = TrainingConfig(
            run_name="x", output_dir=tmp_path / folder, batch_size=BATCH, max_steps=4,
            learning_rate=1e-3, log_every=1, eval_every=2, tokens_per_micro_batch=300,
        )  # fmt: skip
        data = PreferenceDatasetConfig(dataset_name=str(files.pairs), eval_fraction=0.2)
        run_dpo(files.checkpoint, config, DPOConfig(max_length=LENGTH, **moving), data)
        return losses(tmp_path / folder, "eval/loss")

    moving = evaluated("moving", reference_sync_every=2, reference_mixup=1.0)
    frozen = evaluated("frozen")
    assert moving[0] == frozen[0] != pytest.approx(math.log(2), abs=1e-4)
    assert moving[1] != pytest.approx(math.log(2), abs=1e-4), "scored with the copied policy"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--dpo.reference_sync_every", "0"], "reference_sync_every"),
        (["--dpo.reference_sync_every", "4", "--dpo.reference_mixup", "0"], "reference_mixup"),
        (["--dpo.reference_sync_every", "4", "--dpo.reference_mixup", "1.5"], "reference_mixup"),
        (["--dpo.reference_mixup", "0.5"], "no effect without reference_sync_every"),
        (
            ["--dpo.reference_sync_every", "4", "--dpo.reference", "store"],
            "cannot be combined with reference: store",
        ),
        (
            ["--dpo.reference_sync_every", "4", "--dpo.reference", "model"],
            "cannot be combined with reference: model",
        ),
        (
            ["--dpo.reference_sync_every", "4", "--dpo.reference_checkpoint", "x"],
            "remove reference_checkpoint",
        ),
        (
            ["--dpo.reference_sync_every", "4", "--dpo.loss_type", "simpo"],
            "reference_sync_every has no effect with loss_type='simpo'",
        ),
    ],
)
def test_bad_settings_are_one_line_before_a_model_is_loaded(options, sentence, tmp_path, capsys):
    arguments = ["dpo", "--sft_checkpoint", str(tmp_path / "none"), "--train.run_name", "x"]
    arguments += ["--data.dataset_name", str(tmp_path / "none.jsonl")]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and sentence in error and "dpo" in error, error


def on_a_rank(files: Files, folder: Path) -> dict[str, list[float]]:
    """Names are of the plain loop and the engine; `whole` is the run without a break."""
    cpu = {"device": "cpu"}
    engines = {
        "ddp": None, "zero0": stage(0), "zero1": stage(1), "zero2": stage(2), "zero3": stage(3),
        "offload2": stage(2, offload_optimizer=cpu),
        "offload3": stage(3, offload_optimizer=cpu, offload_param=cpu),
    }  # fmt: skip
    found = {}

    def run(case: str, engine: str, place: str, break_at: int | None = None) -> list[float]:
        use_deepspeed(engines[engine], folder)
        try:
            with broken_at(break_at):
                return our_run(files, CASES[case], folder / case[:4] / place, save_every=3)
        except KeyboardInterrupt:
            torch.distributed.barrier()
            return []

    for engine in engines:
        if engine in ("ddp", "zero2", "zero3"):
            run(WINDOWS, engine, engine, break_at=8)
            found[f"whole {engine}"] = run(WINDOWS, engine, f"whole-{engine}")
        found[f"{WINDOWS[:4]} {engine}"] = run(WINDOWS, engine, engine)
        if engine in ("ddp", "zero3"):
            found[f"{ADAPTERS[:4]} {engine}"] = run(ADAPTERS, engine, engine)
    # Broken under one engine, resumed under another.
    run(WINDOWS, "zero3", "across", break_at=10)
    found[f"{WINDOWS[:4]} across"] = run(WINDOWS, "zero2", "across")
    return found


@pytest.mark.slow
def test_two_processes_under_every_engine_resume_and_equal_the_plain_loop(files, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    plain = {name[:4]: plain_loop(files, CASES[name]) for name in (WINDOWS, ADAPTERS)}
    for rank in run_ranks(on_a_rank, 2, files, tmp_path, timeout=500):
        for name, found in rank.items():
            kind, engine = name.split()
            if kind == "whole":
                assert found == rank[f"{WINDOWS[:4]} {engine}"], engine
            else:
                near(found, plain[kind])
