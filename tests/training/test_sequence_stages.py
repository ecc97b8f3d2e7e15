"""Every stage, a resume and `score` where processes share rows, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.evaluation.score import score_pairs
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft
from tests.helpers.kto import labelled, our_run
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import WORDS, write_jsonl

STEPS = 6
NAMES = ("loss", "grad_norm", "eval/loss", "rewards/chosen", "kl")


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": 5, "max_steps": STEPS, "log_every": 1,
        "learning_rate": 3e-3, "tokens_per_micro_batch": 200,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{n: r[n] for n in NAMES if n in r} for r in map(json.loads, lines)]


def inputs(folder: Path, tokenizer: Path, checkpoint: Path, pairs: Path) -> dict[str, Path]:
    documents = [{"text": " ".join(WORDS[i % 7 :: 2] * (1 + i % 3))} for i in range(60)]
    answers = [
        {"prompt": f"say {w}:", "response": f" {w}" * (1 + i % 6)} for i, w in enumerate(WORDS)
    ]
    return {
        "documents": write_jsonl(folder / "documents.jsonl", documents),
        "answers": write_jsonl(folder / "answers.jsonl", answers),
        "labelled": write_jsonl(folder / "labelled.jsonl", labelled(40)),
        "tokenizer": tokenizer, "checkpoint": checkpoint, "pairs": pairs,
    }  # fmt: skip


def stages(given: dict[str, Path], folder: Path, size: int) -> dict[str, Any]:
    """Run all of them on this process; return the numbers of every step, and the scores."""
    shared = {"sequence_parallel": size}
    shape = ModernLLMConfig(vocab_size=300, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    start = run_training(
        shape,
        config(folder / "pretrain", tokenizer_name=str(given["tokenizer"]), **shared),
        DocumentDatasetConfig(dataset_name=str(given["documents"])),
    )
    answers = InstructionDatasetConfig(dataset_name=str(given["answers"]), eval_fraction=0.2)
    run_sft(start, config(folder / "sft", eval_every=3, **shared), answers)
    our_run(given["checkpoint"], given["labelled"], folder / "kto", max_steps=STEPS, **shared)
    run_dpo(
        given["checkpoint"],
        config(folder / "lora", eval_every=3, **shared),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(given["pairs"]), eval_fraction=0.2),
        lora_config=LoraConfig(rank=4),
    )
    output = folder / "scores.jsonl"
    pairs = PreferenceDatasetConfig(dataset_name=str(given["pairs"]))
    score_pairs(str(given["checkpoint"]), pairs, output, max_length=96, **shared)
    found = {name: records(folder / name) for name in ("pretrain", "sft", "kto", "lora")}
    scores = [json.loads(line) for line in output.read_text().splitlines()]
    columns = ("policy_chosen", "policy_rejected", "chosen_tokens")
    return found | {"score": [{name: row[name] for name in columns} for row in scores]}


@pytest.mark.slow
def test_stages_and_scores(tmp_path, tiny_tokenizer, tiny_checkpoint, tiny_pairs):
    given = inputs(tmp_path, tiny_tokenizer, tiny_checkpoint, tiny_pairs)
    expected = stages(given, tmp_path / "one", 1)
    assert "eval/loss" in expected["sft"][-1] and "kl" in expected["kto"][-1]
    for found in run_ranks(stages, 2, given, tmp_path / "two", 2, timeout=400):
        for name, rows in expected.items():
            assert len(found[name]) == len(rows)
            for step, (one, other) in enumerate(zip(found[name], rows, strict=True)):
                assert one == pytest.approx(other, rel=1e-5, abs=1e-6), (name, step)


def broken(
    checkpoint: Path, pairs: Path, folder: Path, size: int, break_at: int | None
) -> list[dict[str, float]]:
    """Return the numbers of a DPO run that is interrupted in step `break_at`, or ends."""
    try:
        with broken_at(break_at):
            run_dpo(
                checkpoint,
                config(folder, save_every=2, max_steps=8, sequence_parallel=size),
                DPOConfig(max_length=96),
                PreferenceDatasetConfig(dataset_name=str(pairs)),
            )
    except KeyboardInterrupt:
        assert break_at is not None
    return records(folder)


@pytest.mark.slow
def test_a_run_resumes_where_other_processes_share_rows(tmp_path, tiny_checkpoint, tiny_pairs):
    given = tiny_checkpoint, tiny_pairs
    whole = broken(*given, tmp_path / "whole", 1, None)
    # From one process to two, to four, and back to one.
    place = tmp_path / "run"
    broken(*given, place, 1, 3)
    run_ranks(broken, 2, *given, place, 2, 5, timeout=200)
    run_ranks(broken, 4, *given, place, 4, 7, timeout=200)
    found = broken(*given, place, 1, None)
    assert len(found) == len(whole) == 8
    for one, other in zip(found, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
