"""The same run on 1, 2 and 4 processes, under DDP and every ZeRO stage, gives the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modern_llm.storage.atomic import verified_manifest
from tests.helpers.text import make_checkpoint, transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, run_cases, stage, weights

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")

KINDS = {"ddp": None, "zero0": stage(0), "zero1": stage(1), "zero2": stage(2), "zero3": stage(3)}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "p.jsonl", transcripts(45))


def same_run(found: list[tuple], expected: list[tuple], rel: float) -> None:
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, rel=rel), step


def close(one: Path, other: Path, within: float) -> None:
    found, expected = weights(one), weights(other)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert float((found[name] - tensor).abs().max()) <= within, name


def matrix(checkpoint: Path, data: Path, folder: Path, **fields) -> None:
    """Run every kind on 1, 2 and 4 processes, and compare with one process without a launcher."""
    alone = Case(folder / "alone", **fields)
    expected = dpo(checkpoint, data, alone)
    assert len(expected) == 20
    assert max(e[0] for e in expected) - min(e[0] for e in expected) > 0.02, "it must have moved"
    for world in (1, 2, 4):
        place = folder / str(world)
        cases = {name: Case(place / name, zero, **fields) for name, zero in KINDS.items()}
        for name, found in run_cases(world, checkpoint, data, cases).items():
            # Losses, and with them the clipped norm and the learning rate of every step.
            same_run(found, expected, 1e-5)
            close(place / name, alone.folder, 1e-4)


@pytest.mark.slow
def test_own_text(tmp_path, tiny_checkpoint, pairs):
    matrix(tiny_checkpoint, pairs, tmp_path)


@pytest.mark.slow
def test_real_pairs(tmp_path, shared):
    matrix(
        shared / "golden" / "llama" / "policy",
        shared / "data" / "hh_rlhf_sample.jsonl",
        tmp_path,
        train={"learning_rate": 3e-4, "batch_size": 4, "tokens_per_micro_batch": 500},
        dpo={"max_length": 160},
    )


def rounded(checkpoint: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy whose weights are representable in bfloat16, in files of `dtype`."""
    place = folder / f"rounded-{str(dtype).removeprefix('torch.')}"
    shutil.copytree(checkpoint, place)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.to(dtype).save_pretrained(place)
    return place


@pytest.mark.slow
def test_tied_embeddings_offload_live_reference_and_bfloat16(tmp_path, tiny_tokenizer, pairs):
    tied = make_checkpoint(tmp_path / "tied", tiny_tokenizer, tie_embeddings=True)
    cpu = {"device": "cpu"}
    both = stage(3, offload_optimizer=cpu, offload_param=cpu)
    few, low = {"max_steps": 8}, {"max_steps": 8, "mixed_precision": "bf16"}
    cases = {
        "alone": Case(tmp_path / "alone", train=few),
        "offload2": Case(tmp_path / "offload2", stage(2, offload_optimizer=cpu), few),
        "offload3": Case(tmp_path / "offload3", both, few),
        "tied3": Case(tmp_path / "tied3", stage(3), few),
        # The frozen reference beside the policy, in its own engine.
        "live2": Case(tmp_path / "live2", stage(2), few, {"reference": "model"}),
        "live3": Case(tmp_path / "live3", stage(3), few, {"reference": "model"}),
        "low": Case(tmp_path / "low", train=low),
        **{f"low{n}": Case(tmp_path / f"low{n}", stage(n), low) for n in range(4)},
        # The same weights in files of 16 bits, which are mapped, and of 32 bits, which are rounded.
        **{
            name: Case(tmp_path / name, stage(3), low, checkpoint=rounded(tied, tmp_path, dtype))
            for name, dtype in (("of16", torch.bfloat16), ("of32", torch.float32))
        },
    }
    found = run_cases(2, tied, pairs, cases)
    for name in ("offload2", "offload3", "tied3", "live2", "live3"):
        same_run(found[name], found["alone"], 1e-5)
        close(tmp_path / name, tmp_path / "alone", 1e-4)
    assert found["of16"] == found["of32"]
    for name in ("low0", "low1", "low2", "low3"):
        for (loss, norm, rate), (other, other_norm, other_rate) in zip(
            found[name], found["low"], strict=True
        ):
            assert loss == pytest.approx(other, rel=1e-2)
            assert norm == pytest.approx(other_norm, rel=3e-2)
            assert rate == other_rate
        # The exported weights are the trained float32 ones, not those of the forward.
        close(tmp_path / name, tmp_path / "low", 1e-2)


@pytest.mark.slow
def test_resume_under_every_stage_and_across_stages_and_worlds(tmp_path, tiny_checkpoint, pairs):
    few = {"max_steps": 8, "save_every": 3}
    low = few | {"mixed_precision": "bf16"}
    kinds = {
        "zero0": (stage(0), few), "zero1": (stage(1), few), "zero2": (stage(2), few),
        "zero3": (stage(3), few), "low2": (stage(2), low), "low3": (stage(3), low),
    }  # fmt: skip
    first, again, whole = {}, {}, {}
    for name, (zero, train) in kinds.items():
        whole[f"{name} whole"] = Case(tmp_path / f"{name}-whole", zero, train)
        first[f"{name} broken"] = Case(tmp_path / name, zero, train, break_at=5)
        again[name] = Case(tmp_path / name, zero, train)
    # Interrupted under one kind, resumed under another; the last one resumes alone, below.
    first |= {
        f"{name} from": Case(tmp_path / name, zero, few, break_at=7)
        for name, zero in {"2 to 3": stage(2), "3 to ddp": stage(3), "alone": stage(3)}.items()
    }
    again |= {
        "2 to 3": Case(tmp_path / "2 to 3", stage(3), few),
        "3 to ddp": Case(tmp_path / "3 to ddp", None, few),
    }
    found = run_cases(2, tiny_checkpoint, pairs, whole | first | again, timeout=500)
    for name in kinds:
        assert found[name] == found[f"{name} whole"], f"{name}: not bitwise the same run"
        close(tmp_path / name, tmp_path / f"{name}-whole", 0.0)
    facts = verified_manifest(tmp_path / "zero3" / "checkpoints" / "step-00000006")
    assert facts["step"] == 6
    alone = dpo(tiny_checkpoint, pairs, Case(tmp_path / "alone", train=few))
    for name, result in {**found, "alone": alone}.items():
        if name in ("2 to 3", "3 to ddp", "alone"):
            same_run(result, found["zero0 whole"], 1e-5)
            close(tmp_path / name, tmp_path / "zero0-whole", 1e-4)
