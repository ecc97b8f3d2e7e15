"""The learning rate as a pure function of the step, and when something is due.

There is no scheduler object: it would add state to save, and Accelerate steps a prepared scheduler
once per process.
"""

from __future__ import annotations

import math

import torch

from modern_llm.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `total`.

    It rises linearly and peaks at the last step of the warm-up. It then decays towards
    `min_learning_rate_ratio` of the peak, which step `total` would reach: the last step still
    learns.
    """
    warmup = config.warmup_of(total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    if config.schedule == "constant":
        return config.learning_rate
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * shape)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set `rate` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def is_due(every: int, step: int, total: int, *, at_end: bool = False) -> bool:
    """Whether an action with interval `every` is due after step `step` (counted from 1)."""
    return step % every == 0 or (at_end and step == total)
