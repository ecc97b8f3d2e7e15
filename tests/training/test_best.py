"""The best evaluation: which one it is, when it ends a run, and what a checkpoint records."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.training.best import Best, best_of


def test_lower_losses_and_higher_margins_are_better():
    loss, margin = Best("eval/loss"), Best("eval/rewards/margins")
    values = [0.7, 0.5, 0.6, math.nan, 0.4]
    assert [loss.look(n, {"eval/loss": v}) for n, v in enumerate(values)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert [margin.look(n, {"eval/rewards/margins": v}) for n, v in enumerate(values)] == [
        True, False, False, False, False,
    ]  # fmt: skip
    assert (loss.value, loss.step, loss.since) == (0.4, 4, 0)
    assert (margin.value, margin.step, margin.since) == (0.7, 0, 4)


def test_patience_counts_evaluations_in_a_row_that_are_not_better():
    best = Best("eval/loss", patience=2)
    ends = []
    for step, value in enumerate([0.5, 0.6, 0.4, 0.4, 0.5]):
        best.look(step, {"eval/loss": value})
        ends.append(best.exhausted)
    assert ends == [False, False, False, False, True]


def test_a_checkpoint_restores_it_unless_it_is_of_another_metric():
    best = Best("eval/loss", patience=2)
    best.look(3, {"eval/loss": 0.5})
    best.look(6, {"eval/loss": 0.9})
    again, other = Best("eval/loss", patience=2), Best("eval/rewards/margins")
    again.load(best.saved())
    other.load(best.saved())
    assert again == best and (other.value, other.since) == (None, 0)
    never = Best("eval/loss", patience=2)
    never.look(3, {"eval/loss": math.nan})
    again = Best("eval/loss", patience=2)
    again.load(never.saved())
    again.look(6, {"eval/loss": math.inf})
    assert again.exhausted and str(again) == "eval/loss, which was never finite"


def test_a_metric_that_the_evaluations_lack_is_refused_before_training():
    fields = {"run_name": "r", "output_dir": Path("x"), "keep_best": True}
    config = TrainingConfig(**fields, best_metric="eval/reward/margins")
    with pytest.raises(ConfigError, match=r"did you mean eval/rewards/margins\?.*name one of"):
        best_of(config, frozenset({"loss", "rewards/margins"}))
    assert best_of(TrainingConfig(**fields), frozenset({"loss"})) == Best("eval/loss")
    assert best_of(TrainingConfig(run_name="r", output_dir=Path("x")), frozenset()) is None
    with pytest.raises(ValueError, match="best_metric has no effect without keep_best"):
        TrainingConfig(run_name="r", output_dir=Path("x"), best_metric="eval/loss")
