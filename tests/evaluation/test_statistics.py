"""Accuracy, intervals and calibration against closed forms, other code and known truths."""

from __future__ import annotations

import numpy as np
import pytest

from modern_llm.evaluation.statistics import (
    bootstrap_mean,
    calibration,
    judge,
    judge_groups,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes, count, low, high):
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_without_a_pair_is_the_whole_interval():
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_bootstrap_is_near_the_normal_interval_and_repeats():
    values = np.random.default_rng(1).normal(0.4, 2.0, size=800)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 800**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_mean(values) == (low, high)
    assert bootstrap_mean(np.array([3.0])) == (3.0, 3.0)


def test_ties_are_counted_separately():
    rewards = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 2.0], [3.0, 1.0]])
    found = judge(rewards)
    assert (found["pairs"], found["accuracy"], found["ties"]) == (4, 0.5, 0.25)
    assert found["margin"] == pytest.approx(0.25)
    assert (found["reward_chosen"], found["reward_rejected"]) == pytest.approx((1.125, 0.875))


def test_true_probabilities_have_no_calibration_error():
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=200_000) * 2
    # The first of the two answers is chosen with probability sigmoid(gap).
    right = rng.random(200_000) < 1 / (1 + np.exp(-gaps))
    margins = np.where(right, gaps, -gaps)
    found = calibration(margins)
    assert found["expected_error"] < 0.01
    assert sum(bin["pairs"] for bin in found["bins"]) == 200_000
    for bin in found["bins"]:
        assert bin["from"] <= bin["confidence"] <= bin["to"] + 1e-12
    assert calibration(margins * 5)["expected_error"] > 0.1  # the same order, but overconfident


def test_log_loss_and_brier_are_their_formulas():
    margins = np.array([0.3, -1.2, 2.0, 0.0])
    p = 1 / (1 + np.exp(-margins))
    found = calibration(margins)
    assert found["log_loss"] == pytest.approx(-np.log(p).mean())
    assert found["brier"] == pytest.approx(((1 - p) ** 2).mean())
    assert calibration(np.zeros(5))["expected_error"] == 0  # half right without confidence
    assert np.isfinite(calibration(np.array([1e5, -1e5]))["log_loss"])


def test_groups_are_judged_separately():
    rewards = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    found = judge_groups(rewards, {"source": ["a", "b", "a"]})
    assert {n: (g["pairs"], g["accuracy"]) for n, g in found["source"].items()} == {
        "a": (2, 1.0), "b": (1, 0.0)
    }  # fmt: skip
