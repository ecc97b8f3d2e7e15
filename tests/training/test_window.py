"""A logged line averages over the examples since the last one, also after skips and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.training import accumulation
from modern_llm.training.tasks.preference import PreferenceTask
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at

AVERAGED = ("loss", "rewards/chosen", "rewards/accuracies", "logps/rejected")


def lines(folder: Path, checkpoint: Path, pairs: Path, **changes) -> dict[int, dict[str, float]]:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 4, "max_steps": 11, "log_every": 5,
        "save_every": 4, "learning_rate": 1e-3, "tokens_per_micro_batch": 300,
    }  # fmt: skip
    config = TrainingConfig(**(fields | changes))
    data = PreferenceDatasetConfig(dataset_name=str(pairs))
    run_dpo(checkpoint, config, DPOConfig(max_length=96), data)
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r for r in found}


def mean(every: dict[int, dict[str, float]], steps, name: str) -> float:
    """Mean over the examples of these steps; the last step of an epoch has fewer of them."""
    sizes = [every[s]["examples"] - every.get(s - 1, {"examples": 0})["examples"] for s in steps]
    return sum(every[s][name] * n for s, n in zip(steps, sizes, strict=True)) / sum(sizes)


def test_a_line_is_the_mean_over_the_steps_since_the_last_one(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    every = lines(tmp_path / "each", tiny_checkpoint, tiny_pairs, log_every=1)
    seldom = lines(tmp_path / "five", tiny_checkpoint, tiny_pairs)
    assert list(seldom) == [1, 5, 10, 11]
    for last, steps in {1: [1], 5: range(2, 6), 10: range(6, 11), 11: [11]}.items():
        for name in AVERAGED:
            expected = mean(every, list(steps), name)
            assert seldom[last][name] == pytest.approx(expected, rel=1e-12, abs=1e-12), (last, name)
        for name in ("lr", "grad_norm"):
            assert seldom[last][name] == every[last][name]


@pytest.mark.slow
def test_the_lines_after_a_resume_are_those_of_a_run_without_one(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    whole = lines(tmp_path / "whole", tiny_checkpoint, tiny_pairs)
    with broken_at(9), pytest.raises(KeyboardInterrupt):
        lines(tmp_path / "broken", tiny_checkpoint, tiny_pairs)
    broken = lines(tmp_path / "broken", tiny_checkpoint, tiny_pairs)
    for step, record in whole.items():
        assert {n: broken[step][n] for n in AVERAGED} == {n: record[n] for n in AVERAGED}


def test_a_skipped_step_is_left_out_of_the_averages(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    real = PreferenceTask.run
    bad = {4}

    def run(self, model, batch):
        found = real(self, model, batch)
        if accumulation.heartbeat.here.step in bad:
            found.statistics["loss"] = found.statistics["loss"] * float("inf")
            return found._replace(loss=found.loss * float("nan"))
        return found

    monkeypatch.setattr(PreferenceTask, "run", run)
    skip = {"on_nonfinite": "skip"}
    every = lines(tmp_path / "each", tiny_checkpoint, tiny_pairs, log_every=1, **skip)
    seldom = lines(tmp_path / "five", tiny_checkpoint, tiny_pairs, **skip)
    assert list(seldom) == [1, 4, 5, 10, 11]  # a skipped step is logged though no line is due
    assert every[4]["loss"] is None and seldom[4]["skipped_steps"] == 1
    for name in AVERAGED:
        assert seldom[4][name] == pytest.approx(mean(every, [2, 3], name), rel=1e-12)
        assert seldom[5][name] == pytest.approx(every[5][name], rel=1e-12)


def on_two(folder: Path, checkpoint: Path, pairs: Path) -> dict[int, dict[str, float]]:
    import torch.distributed as dist

    found = lines(folder, checkpoint, pairs)
    assert dist.get_world_size() == 2
    return found


@pytest.mark.slow
def test_two_processes_average_over_the_examples_of_both(tmp_path, tiny_checkpoint, tiny_pairs):
    alone = lines(tmp_path / "one", tiny_checkpoint, tiny_pairs)
    both = run_ranks(on_two, 2, tmp_path / "two", tiny_checkpoint, tiny_pairs, timeout=200)[0]
    for step, record in alone.items():
        for name in AVERAGED:
            assert both[step][name] == pytest.approx(record[name], rel=1e-3, abs=1e-4), (step, name)
