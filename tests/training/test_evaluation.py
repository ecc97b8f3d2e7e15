"""Evaluation uses every held-out example once on any number of processes; metrics are exact."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.evaluation.score import score_pairs
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.text import transcripts, write_jsonl

BETA = 0.3


def evaluated(checkpoint: Path, pairs: Path, held_out: Path, folder: Path, loss_type: str) -> dict:
    config = TrainingConfig(
        run_name="e", output_dir=folder, batch_size=6, max_steps=3, eval_every=2, log_every=3,
        learning_rate=2e-3, tokens_per_micro_batch=250,
    )  # fmt: skip
    run_dpo(
        checkpoint,
        config,
        DPOConfig(max_length=96, beta=BETA, loss_type=loss_type),
        PreferenceDatasetConfig(dataset_name=str(pairs), eval_dataset_name=str(held_out)),
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines)}
    assert [step for step, r in records.items() if "eval/loss" in r] == [2, 3]
    return {k: v for k, v in records[3].items() if k.startswith("eval/")}


def on_a_rank(*arguments) -> list[dict]:
    import torch.distributed as dist

    *rest, folder = arguments
    results = [evaluated(*rest, folder / loss, loss) for loss in ("sigmoid", "aot")]
    assert dist.get_world_size() == 2
    return results


@pytest.mark.slow
def test_metrics_are_those_of_the_final_model_on_one_and_two_processes(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", transcripts(17, seed=4))
    alone = [
        evaluated(tiny_checkpoint, tiny_pairs, held_out, tmp_path / loss, loss)
        for loss in ("sigmoid", "aot")
    ]
    score_pairs(
        str(tmp_path / "sigmoid" / "e_final"),
        PreferenceDatasetConfig(dataset_name=str(held_out)),
        tmp_path / "scores.jsonl",
        reference=str(tiny_checkpoint),
        max_length=96,
    )
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 17
    rewards = np.array(
        [
            [BETA * (r[f"policy_{s}"] - r[f"reference_{s}"]) for s in ("chosen", "rejected")]
            for r in rows
        ]
    )
    margins = rewards[:, 0] - rewards[:, 1]
    expected = {
        "eval/loss": float(np.mean([math.log1p(math.exp(-m)) for m in margins])),
        "eval/rewards/accuracies": float((margins > 0).mean()),
        "eval/rewards/chosen": float(rewards[:, 0].mean()),
        "eval/rewards/rejected": float(rewards[:, 1].mean()),
        "eval/rewards/margins": float(margins.mean()),
        "eval/logps/chosen": float(np.mean([r["policy_chosen"] for r in rows])),
    }
    for name, value in expected.items():
        assert alone[0][name] == pytest.approx(value, abs=1e-4), name
    for results in run_ranks(
        on_a_rank, 2, tiny_checkpoint, tiny_pairs, held_out, tmp_path / "two", timeout=200
    ):
        for one, two in zip(alone, results, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
