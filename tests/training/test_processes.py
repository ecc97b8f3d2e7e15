"""Pretraining, SFT and resuming give the same run on one and two processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.training.guards import memory as token_budget
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import WORDS, make_checkpoint, write_jsonl
from tests.helpers.zero import stage, use_deepspeed
from tests.training.guards.test_memory import LittleMemory, call, near


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "p", "output_dir": folder, "batch_size": 5, "max_steps": 6, "log_every": 1,
        "learning_rate": 3e-3, "tokens_per_micro_batch": 200,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def inputs(tmp_path, tiny_tokenizer):
    documents = write_jsonl(
        tmp_path / "documents.jsonl",
        [{"text": " ".join(WORDS[i % 7 :: 2] * (1 + i % 3))} for i in range(60)],
    )
    answers = write_jsonl(
        tmp_path / "answers.jsonl",
        [{"prompt": f"say {w}:", "response": f" {w}" * (1 + i % 6)} for i, w in enumerate(WORDS)],
    )
    moe = make_checkpoint(
        tmp_path / "moe",
        tiny_tokenizer,
        use_moe=True,
        ffn_hidden_size=32,
        moe_config={"num_experts": 4},
    )
    return tiny_tokenizer, documents, answers, moe


def language_stages(inputs: tuple, folder: Path) -> list[list[float]]:
    tokenizer, documents, answers, moe = inputs
    shape = ModernLLMConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    final = run_training(
        shape,
        config(folder / "lm", tokenizer_name=str(tokenizer)),
        DocumentDatasetConfig(dataset_name=str(documents)),
    )
    data = InstructionDatasetConfig(dataset_name=str(answers), eval_fraction=0.2)
    run_sft(final, config(folder / "sft"), data)
    # The load-balancing loss is a mean within each forward, so with experts runs differ slightly.
    run_sft(moe, config(folder / "moe_sft"), data)
    return [losses(folder / name) for name in ("lm", "sft", "moe_sft")]


def on_a_rank(
    inputs: tuple, folder: Path, checkpoint: Path, pairs: Path
) -> tuple[list[list[float]], dict]:
    import torch.distributed as dist

    result = language_stages(inputs, folder), short_of_memory(checkpoint, pairs, folder / "short")
    assert dist.get_world_size() == 2
    return result


@pytest.mark.slow
def test_language_stages(inputs, tmp_path, tiny_checkpoint, tiny_pairs):
    alone = language_stages(inputs, tmp_path / "one")
    pairs = tiny_checkpoint, tiny_pairs
    plain = call(tmp_path / "plain", *pairs)
    ranks = run_ranks(on_a_rank, 2, inputs, tmp_path / "two", *pairs, timeout=250)
    for rank, (found, short) in enumerate(ranks):
        for at, (one, two) in enumerate(zip(alone, found, strict=True)):
            assert one == pytest.approx(two, rel=2e-3 if at == 2 else 1e-5)
            assert one[-1] < one[0]
        # Memory ran out only on rank 1; both ranks repeated the step.
        assert short["ran_out"] == ([0] if rank == 1 else [])
        assert near(short["whole"], plain)
        assert {r["tokens_per_micro_batch"] for r in short["whole"]} == {short["budget"]}
    assert ranks[0][1]["budget"] == ranks[1][1]["budget"] < 300


def short_of_memory(checkpoint: Path, pairs: Path, folder: Path) -> dict:
    """Memory runs out on rank 1 while the processes search for the size that fits."""
    found: dict = {}
    token_budget.SEARCH_STEPS["cpu"] = 2
    with LittleMemory(300, rank=1) as memory:
        found["whole"] = call(folder / "found", checkpoint, pairs)
    note = json.loads((folder / "found" / token_budget.FILE).read_text())
    found |= {"ran_out": memory.ran_out, "budget": note["tokens_per_micro_batch"]}
    return found


def under_zero(inputs: tuple, folder: Path) -> dict[int, list[list[float]]]:
    import torch.distributed as dist

    result = {}
    for number in (2, 3):
        use_deepspeed(stage(number), folder)
        result[number] = language_stages(inputs, folder / str(number))
    assert dist.get_world_size() == 2
    return result


@pytest.mark.slow
def test_language_stages_with_evaluation_under_zero(inputs, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    alone = language_stages(inputs, tmp_path / "one")
    for rank in run_ranks(under_zero, 2, inputs, tmp_path / "two", timeout=250):
        for found in rank.values():
            for at, (one, two) in enumerate(zip(alone, found, strict=True)):
                assert one == pytest.approx(two, rel=2e-3 if at == 2 else 1e-5)
    wanted = evaluations(tmp_path / "one" / "sft")
    assert wanted
    for number in (2, 3):
        assert evaluations(tmp_path / "two" / str(number) / "sft") == pytest.approx(wanted, 1e-5)


def evaluations(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["eval/loss"] for record in records if "eval/loss" in record]


def broken_dpo(checkpoint: Path, pairs: Path, folder: Path, break_at: int | None) -> list[float]:
    """A DPO run that is interrupted in step `break_at`, or runs to its end."""
    try:
        with broken_at(break_at):
            run_dpo(
                checkpoint,
                config(folder, save_every=2, max_steps=8),
                DPOConfig(max_length=96),
                PreferenceDatasetConfig(dataset_name=str(pairs)),
            )
    except KeyboardInterrupt:
        assert break_at is not None
    return losses(folder)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tmp_path, tiny_checkpoint, tiny_pairs):
    whole = broken_dpo(tiny_checkpoint, tiny_pairs, tmp_path / "whole", None)
    run_ranks(broken_dpo, 2, tiny_checkpoint, tiny_pairs, tmp_path / "a", 5, timeout=120)
    assert broken_dpo(tiny_checkpoint, tiny_pairs, tmp_path / "a", None) == pytest.approx(
        whole, rel=1e-5
    )
    broken_dpo(tiny_checkpoint, tiny_pairs, tmp_path / "b", 3)
    for rank in run_ranks(
        broken_dpo, 2, tiny_checkpoint, tiny_pairs, tmp_path / "b", None, timeout=120
    ):
        assert rank == pytest.approx(whole, rel=1e-5)
