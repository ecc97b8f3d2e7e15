"""`modern-llm evaluate`: accuracy, margins and calibration of a policy on preference pairs.

Statistics are computed in the order of the data, so the result does not depend on the number of
processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.read.readers import Row
from modern_llm.data.table.iterate import training_sources
from modern_llm.evaluation.score import Scored, scored_pairs
from modern_llm.evaluation.statistics import calibration, judge, judge_groups, mean


def evaluate_pairs(
    model: str,
    data: PreferenceDatasetConfig,
    *,
    reference: str | None = None,
    beta: float = 0.1,
    by: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate `model` on the pairs of `data`.

    Args:
        model: Hub id, `transformers` folder or `.pt` file.
        reference: likewise; the reward of an answer is beta * (log p_model - log p_reference).
            Without it the reward is beta * log p_model.
        by: column of the data to group by; default: group by file.
        options: options of `score_pairs`.

    Returns:
        The statistics of all pairs (each counted by its `weight` where the data has one), the share
        `margins_reached` where it has margins, `calibration`, and the same statistics for `groups`:
        by `by`, and by which answer is longer.

    Raises:
        DataError: no row has the column `by`.
    """
    with scored_pairs(model, data, reference=reference, **options) as scored:
        rewards = beta * scored.sums("policy")
        if reference is not None:
            rewards = rewards - beta * scored.sums("reference")
        weights = scored.values("weight")
        groups = {by or "file": _groups(scored, data, by), "length": _by_length(scored)}
        return {
            "model": model,
            "reference": reference,
            "beta": beta,
            "dropped": scored.dropped,
            **judge(rewards, weights),
            **_reached(rewards, scored.values("margin"), weights),
            "calibration": calibration(rewards[:, 0] - rewards[:, 1], weights),
            "groups": judge_groups(rewards, groups, weights),
        }


def _reached(
    rewards: NDArray[np.float64],
    margins: NDArray[np.float64] | None,
    weights: NDArray[np.float64] | None,
) -> dict[str, float]:
    """Return the share of pairs whose rewards differ by more than the margin of the data."""
    if margins is None:
        return {}
    reached = rewards[:, 0] - rewards[:, 1] > margins
    w = np.ones(len(reached)) if weights is None else weights
    return {"margins_reached": mean(reached, w)}


def _by_length(scored: Scored) -> list[str]:
    """Return the longer answer of each pair, to detect a policy that prefers long answers."""
    counts = scored.counts
    names = np.array(["rejected longer", "same length", "chosen longer"])
    return names[np.sign(counts[:, 0] - counts[:, 1]) + 1].tolist()


def _groups(scored: Scored, data: PreferenceDatasetConfig, by: str | None) -> list[str]:
    origins = [scored.prepared.train.origin(int(row)) for row in scored.rows]
    if by is None:
        return [origin.rpartition(":")[0] for origin in origins]
    values = {
        row.origin: row.values[by]
        for part in training_sources(data)
        for row in part.source
        if isinstance(row, Row) and by in row.values
    }
    if not any(origin in values for origin in origins):
        raise DataError(f"by {by!r}: no row of {', '.join(data.names)} has that column")
    return [str(values.get(origin, "(none)")) for origin in origins]
