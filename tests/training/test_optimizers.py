"""Optimizers and dtypes of weights in whole runs: they learn, resume exactly, and are refused."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed import frozen_engine, linked_optimizers
from modern_llm.training import optimizers
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.models import make_model
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.zero import stage, use_deepspeed
from tests.training.test_lora import config, losses

HALVES = {"weights": "bfloat16", "mixed_precision": "bf16"}
RATES = {"adamw": 1e-3, "adamw_8bit": 1e-3, "muon": 1e-3, "adafactor": 3e-3}
STEPS = {"max_steps": 8, "save_every": 3}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (extra: qlora)",
)
NAMES = [
    "adamw",
    pytest.param("adamw_8bit", marks=needs_bitsandbytes),
    "muon",
    "adafactor",
]


def train(checkpoint, pairs, folder: Path, optimizer: str = "adamw", **changes) -> Path:
    settings = STEPS | {"optimizer": optimizer, "learning_rate": RATES[optimizer]} | changes
    return run_dpo(
        checkpoint,
        config(folder, **settings),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_run_resumes_bit_for_bit(
    name, weights, tiny_checkpoint, tiny_pairs, tmp_path
):
    more = HALVES if weights == "bfloat16" else {}
    whole = train(tiny_checkpoint, tiny_pairs, tmp_path / "whole", name, **more)
    found = losses(whole.parent)
    assert found[0] == pytest.approx(0.6931, abs=1e-2) and min(found) < found[0] - 0.01
    with broken_at(5), pytest.raises(KeyboardInterrupt):
        train(tiny_checkpoint, tiny_pairs, tmp_path / "broken", name, **more)
    again = train(tiny_checkpoint, tiny_pairs, tmp_path / "broken", name, **more)
    assert losses(again.parent) == found
    first, second = (load_file(place / "model.safetensors") for place in (whole, again))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}


@pytest.mark.slow
def test_either_dtype_of_weights_resumes_the_other(tiny_checkpoint, tiny_pairs, tmp_path):
    """Checkpoints hold the joined float32 weights, whichever way a run keeps them."""
    for first, second in (({"mixed_precision": "bf16"}, HALVES), (HALVES, {"weights": "float32"})):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with broken_at(5), pytest.raises(KeyboardInterrupt):
            train(tiny_checkpoint, tiny_pairs, folder, **first)
        before = load_file(folder / "checkpoints" / "step-00000003" / "model.safetensors")
        assert {tensor.dtype for tensor in before.values()} == {torch.float32}
        rounded = [torch.equal(t, t.bfloat16().float()) for t in before.values()]
        assert not any(rounded), "nothing may be lost in the checkpoint"
        changed = {"mixed_precision": "bf16", "accept_change": True} | second
        final = train(tiny_checkpoint, tiny_pairs, folder, **changed)
        assert len(losses(final.parent)) == STEPS["max_steps"]


@pytest.mark.slow
def test_a_curve_follows_float32_weights_where_plain_bfloat16_ones_stand_still(
    tiny_checkpoint, tiny_pairs, tmp_path, monkeypatch
):
    settings = {"max_steps": 200, "save_every": 500, "learning_rate": 5e-5, "schedule": "constant"}

    def curve(name: str, **more) -> torch.Tensor:
        final = train(tiny_checkpoint, tiny_pairs, tmp_path / name, **settings, **more)
        return torch.tensor(losses(final.parent)).view(20, 10).mean(1)  # of ten steps each

    expected = curve("float32", mixed_precision="bf16")
    split = curve("halves", **HALVES)
    real = linked_optimizers.write_halves

    def without_rest(upper, rest, whole):
        real(upper, rest, whole)
        rest.zero_()

    monkeypatch.setattr(linked_optimizers, "write_halves", without_rest)
    plain = curve("plain", **HALVES)
    assert float(expected[-1]) < 0.6, "it must have learnt"
    assert float(((split - expected) / expected).abs().max()) < 0.01
    assert float(((plain - expected) / expected).abs().max()) > 0.05


def on_a_rank(checkpoint, pairs, folder: Path, cases: dict) -> dict[str, list[float]]:
    found = {}
    for name, (content, changes) in cases.items():
        use_deepspeed(content, folder)
        found[name] = losses(train(checkpoint, pairs, folder / name, **changes).parent)
    return found


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tiny_checkpoint, tiny_pairs, tmp_path):
    """And ZeRO-1, whose bfloat16 weights have float32 copies, computes the same."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    cases = {
        "halves": (None, HALVES),
        "muon": (None, {"optimizer": "muon"}),
        "both": (None, HALVES | {"optimizer": "muon"}),
        "adafactor": (None, {"optimizer": "adafactor"}),
        "zero1": (stage(1), {"mixed_precision": "bf16"}),
    }
    # ZeRO makes its float32 copies from weights that it has rounded: these are exact in bfloat16.
    rounded = tmp_path / "rounded"
    shutil.copytree(tiny_checkpoint, rounded)
    weights = load_file(rounded / "model.safetensors")
    exact = {name: tensor.bfloat16().float() for name, tensor in weights.items()}
    save_file(exact, rounded / "model.safetensors", {"format": "pt"})
    single = dict(list(cases.items())[:-1])
    alone = on_a_rank(rounded, tiny_pairs, tmp_path / "alone", single)
    for seen in run_ranks(on_a_rank, 2, rounded, tiny_pairs, tmp_path, cases, timeout=280):
        expected = alone | {"zero1": alone["halves"]}
        assert set(seen) == set(expected)
        for name, found in seen.items():
            tolerance = 5e-3 if name in ("halves", "both", "zero1") else 1e-4
            assert found == pytest.approx(expected[name], rel=tolerance), name


def refusals(checkpoint, pairs, folder: Path) -> list[str]:
    said = []
    cases = [
        (2, {"weights": "bfloat16", "mixed_precision": "bf16"}),
        (3, {"optimizer": "adamw_8bit"}),
        (1, {"optimizer": "muon"}),
    ]
    for number, changes in cases:
        use_deepspeed(stage(number), folder)
        with pytest.raises(ConfigError) as refused:
            train(checkpoint, pairs, folder / f"zero{number}", **changes)
        said.append(str(refused.value))
    return said


@pytest.mark.slow
def test_zero_refuses_them_before_loading(tiny_checkpoint, tiny_pairs, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    for said in run_ranks(refusals, 1, tmp_path / "no checkpoint", tiny_pairs, tmp_path):
        assert "weights bfloat16: ZeRO-2 keeps its own copies" in said[0]
        assert "adamw_8bit needs whole weights on each process, and ZeRO-3" in said[1]
        assert "muon needs whole weights on each process, and ZeRO-1" in said[2]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (HALVES | {"mixed_precision": "fp16"}, "weights bfloat16 needs mixed_precision bf16"),
        ({"weights": "bfloat16"}, "weights bfloat16 needs mixed_precision bf16, got no"),
        ({"optimizer": "adafactor", "adam_beta2": 0.9}, "no effect with optimizer adafactor"),
        ({"optimizer": "lion"}, "optimizer"),
    ],
)
def test_settings_that_contradict_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(run_name="x", output_dir=Path("x"), **settings)


def test_a_missing_library_is_one_line(tiny_pairs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    arguments = (
        f"dpo --sft_checkpoint {tmp_path / 'none'} --train.run_name x --train.output_dir "
        f"{tmp_path / 'run'} --data.dataset_name {tiny_pairs} --train.optimizer adamw_8bit"
    )
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].endswith("adamw_8bit needs bitsandbytes, which is not installed: "
                             "pip install bitsandbytes")  # fmt: skip


def test_offloaded_activations_need_a_gpu(tiny_pairs, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    arguments = (
        f"dpo --sft_checkpoint {tmp_path / 'none'} --train.run_name x --train.output_dir "
        f"{tmp_path / 'run'} --data.dataset_name {tiny_pairs} "
        "--train.gradient_checkpointing offload"
    )
    assert main(arguments.split()) == 2
    assert "gradient_checkpointing offload needs a GPU" in capsys.readouterr().err


def test_muon_takes_the_matrices_of_layers_alone():
    model = make_model("llama")
    settings = config(Path("x"), optimizer="muon")
    muon, adamw = optimizers.make_optimizer(settings, model).parts
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert taken == {n for n in names.values() if "_proj." in n and n.endswith("weight")}
    left = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert taken | left == set(names.values()) and not taken & left


@pytest.mark.slow
def test_a_frozen_reference_in_16_bits_changes_no_number(
    tiny_checkpoint, tiny_pairs, tmp_path, monkeypatch
):
    """Under autocast a product rounds its weights anyway; the reference then needs half the
    memory."""
    real, kinds = frozen_engine.read_rounded, []

    def noted(module, precision, device):
        real(module, precision, device)
        kinds.append([p.dtype for n, p in module.named_parameters() if "_proj.weight" in n])

    def run(name: str) -> list[float]:
        monkeypatch.setattr(frozen_engine, "read_rounded", noted if name == "rounded" else skip)
        live = DPOConfig(max_length=96, reference="model")
        settings = config(tmp_path / name, mixed_precision="bf16", max_steps=4)
        data = PreferenceDatasetConfig(dataset_name=str(tiny_pairs))
        return losses(run_dpo(tiny_checkpoint, settings, live, data).parent)

    def skip(module, precision, device):
        pass

    assert run("rounded") == run("whole")
    assert kinds == [[torch.bfloat16] * 14]
