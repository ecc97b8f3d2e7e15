"""Statistics of rewards on preference pairs: accuracy, margin and calibration, with 95% intervals.

Pure functions. Letters: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""97.5% quantile of the normal distribution, for 95% intervals."""
RESAMPLES = 2000
BINS = 10


def wilson(successes: float, count: float) -> tuple[float, float]:
    """Return the Wilson score interval (1927) of a share. Unlike the normal approximation it has a
    width at shares of 0 and 1."""
    if count == 0:
        return 0.0, 1.0
    share, z2 = successes / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * (share * (1 - share) / count + z2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(
    values: NDArray[np.float64], seed: int = 0, weights: NDArray[np.float64] | None = None
) -> tuple[float, float]:
    """Return the percentile bootstrap interval (Efron, 1979) of a mean; deterministic."""
    if len(values) < 2:
        return float(values.mean()), float(values.mean())
    w = np.ones(len(values)) if weights is None else weights
    rng = np.random.Generator(np.random.Philox(seed))
    # One resample at a time: the index matrix of all, for a million pairs, would take 16 GB.
    drawn = (rng.integers(0, len(values), len(values)) for _ in range(RESAMPLES))
    means = np.array([mean(values[at], w[at]) for at in drawn])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def calibration(
    margins: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Return the calibration of sigmoid(margin), the Bradley-Terry probability of a pair's order.

    Args:
        margins: (P,) reward of the chosen answer minus that of the rejected one.
        weights: (P,) how often each pair counts; by default once.

    Returns:
        `log_loss` and `brier` of p = sigmoid(margin); `expected_error` (ECE: mean distance between
        confidence and accuracy, weighted by bin) and its `bins`, over the confidence
        max(p, 1 - p). A tie counts as half right.
    """
    w = np.ones(len(margins)) if weights is None else weights
    probability = 1 / (1 + np.exp(-np.clip(margins, -700, 700)))
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(margins == 0, 0.5, margins > 0)
    binned = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins: list[dict[str, Any]] = []
    shares: list[float] = []
    for number in range(BINS):
        inside = binned == number
        if inside.any():
            bins.append(
                {
                    "from": 0.5 + number / (2 * BINS),
                    "to": 0.5 + (number + 1) / (2 * BINS),
                    "pairs": int(inside.sum()),
                    "confidence": mean(confidence[inside], w[inside]),
                    "accuracy": mean(right[inside], w[inside]),
                }
            )
            shares.append(w[inside].sum())
    gaps = [abs(b["confidence"] - b["accuracy"]) for b in bins]
    error = sum(s * gap for s, gap in zip(shares, gaps, strict=True)) / max(w.sum(), 1e-300)
    return {
        "log_loss": mean(np.logaddexp(0, -margins), w),
        "brier": mean((1 - probability) ** 2, w),
        "expected_error": float(error),
        "bins": bins,
    }


def mean(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return a weighted mean; 0 where all weights are 0."""
    return float((values * weights).sum() / max(weights.sum(), 1e-300))


def judge(
    rewards: NDArray[np.float64], weights: NDArray[np.float64] | None = None
) -> dict[str, Any]:
    """Return accuracy (strict `>`, ties separately) and margin, each with its interval.

    Args:
        rewards: (P, 2), chosen and rejected.
        weights: (P,) how often each pair counts; by default once. The interval of the accuracy is
            then that of the effective number of pairs, (sum w)^2 / sum w^2 (Kish, 1965).
    """
    assert rewards.ndim == 2 and rewards.shape[1] == 2, rewards.shape
    margins = rewards[:, 0] - rewards[:, 1]
    w = np.ones(len(margins)) if weights is None else weights
    accuracy = mean(margins > 0, w)
    effective = float(w.sum() ** 2 / max((w**2).sum(), 1e-300))
    found = {
        "pairs": len(margins),
        "accuracy": accuracy,
        "accuracy_interval": wilson(accuracy * effective, effective),
        "ties": mean(margins == 0, w),
        "margin": mean(margins, w),
        "margin_interval": bootstrap_mean(margins, weights=weights),
        "reward_chosen": mean(rewards[:, 0], w),
        "reward_rejected": mean(rewards[:, 1], w),
    }
    return found if weights is None else found | {"weight": float(w.sum())}


def judge_groups(
    rewards: NDArray[np.float64],
    groups: Mapping[str, Sequence[str]],
    weights: NDArray[np.float64] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the result of `judge` for each group of each grouping.

    Args:
        rewards: (P, 2).
        groups: name of a grouping -> the group of each of the P pairs.
    """
    found: dict[str, dict[str, Any]] = {}
    for by, names in groups.items():
        assert len(names) == len(rewards), (by, len(names), len(rewards))
        labels = np.array(names, dtype=object)
        found[by] = {}
        for name in sorted(set(names)):
            mine = labels == name
            w = None if weights is None else weights[mine]
            found[by][str(name)] = judge(rewards[mine], w)
    return found
