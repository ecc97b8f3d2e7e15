"""Loss spikes: with `train.skip_loss_spikes`, a step with an unusually high loss is skipped.

The mean loss of a step over all ranks is known before its last backward pass, so all ranks decide
the same. The gradients of a skipped step are set to NaN, and every engine skips it like a
non-finite one. Running mean and variance are part of the checkpoint, so that a resumed run skips
the same steps as an uninterrupted one.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from modern_llm.training.guards.state import GuardState, no_spikes

log = logging.getLogger(__name__)

WARM = 20
"""Steps observed before one may be skipped."""
WINDOW = 100
"""Steps that the running mean and variance cover."""
MOST_IN_A_ROW = 2
"""Consecutive skips. A third high loss in a row is a new level, so the statistics restart."""


def judge(state: dict[str, Any], loss: float, sigma: float) -> bool:
    """Return whether to skip a step, and update `state`.

    Args:
        loss: mean over the whole step; a non-finite one is handled by `nonfinite`.
        sigma: standard deviations above the running mean.
    """
    if not math.isfinite(loss):
        return False
    limit = state["mean"] + sigma * math.sqrt(state["variance"])
    if state["count"] >= WARM and state["variance"] > 0 and loss > limit:
        if state["in_a_row"] < MOST_IN_A_ROW:
            state["in_a_row"] += 1
            state["skipped"] += 1
            return True
        state |= no_spikes() | {"skipped": state["skipped"]}
    state["in_a_row"] = 0
    state["count"] += 1
    weight = 1 / min(state["count"], WINDOW)
    off = loss - state["mean"]
    state["mean"] += weight * off
    state["variance"] = (1 - weight) * (state["variance"] + weight * off * off)
    return False


def is_spike(guards: GuardState, step: int, loss: float, sigma: float, *, shown: bool) -> bool:
    """Judge a step, once even if it is repeated in smaller micro-batches.

    Args:
        step: counted from 0.
        shown: whether this rank prints the warning.
    """
    if guards.judged[0] != step:
        guards.judged = step, judge(guards.spikes, loss, sigma)
        if guards.judged[1]:
            guards.skips.add(step)
        if guards.judged[1] and shown:
            log.warning(
                "warning: step %d: its loss %.4g is more than %g standard deviations (%.3g) above "
                "the mean %.4g of the steps before; skipped, because train.skip_loss_spikes is set",
                step + 1,
                loss,
                sigma,
                math.sqrt(guards.spikes["variance"]),
                guards.spikes["mean"],
            )
    return guards.judged[1]
