"""Steps whose loss jumps out of its own recent range: passed over where the user asks for it.

The mean loss of a step over all ranks is known before its last backward pass, so that all decide
the same; a step that is passed over is spoiled there, and every engine refuses it as it refuses
what is not finite. The running mean and variance are part of the checkpoint, so a run that goes on
decides as one that was never disturbed. Called by the loop.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from modern_llm.distributed.engine import Engine

log = logging.getLogger(__name__)

WARM = 20
"""Steps that are looked at before one is passed over."""
WINDOW = 100
"""Steps over which mean and variance run."""
MOST_IN_A_ROW = 2
"""The third loss out of range in a row is no spike but where the loss is now: mean and variance
begin anew with it."""


def fresh() -> dict[str, Any]:
    """Return the state of a run that has seen no step."""
    return {"count": 0, "mean": 0.0, "variance": 0.0, "skipped": 0, "in_a_row": 0}


def judge(state: dict[str, Any], loss: float, sigma: float) -> bool:
    """Return whether a step is to be passed over; `state` takes note of it.

    Args:
        loss: mean over the whole step; one that is not finite is left to others.
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
        state |= fresh() | {"skipped": state["skipped"]}
    state["in_a_row"] = 0
    state["count"] += 1
    weight = 1 / min(state["count"], WINDOW)
    off = loss - state["mean"]
    state["mean"] += weight * off
    state["variance"] = (1 - weight) * (state["variance"] + weight * off * off)
    return False


def is_spike(engine: Engine, step: int, loss: float, sigma: float) -> bool:
    """Judge a step once, though its gradients may be made again in smaller forwards.

    Args:
        step: counted from 0.
    """
    if engine.judged[0] != step:
        engine.judged = step, judge(engine.spikes, loss, sigma)
        if engine.judged[1] and engine.accelerator.is_main_process:
            log.warning(
                "warning: step %d: its loss %.4g is more than %g standard deviations (%.3g) above "
                "the mean %.4g of the steps before; passed over, as train.skip_loss_spikes asks",
                step + 1,
                loss,
                sigma,
                math.sqrt(engine.spikes["variance"]),
                engine.spikes["mean"],
            )
    return engine.judged[1]
