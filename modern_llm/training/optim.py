"""AdamW over two groups, and the learning rate as a pure function of the step. No scheduler object
exists.

A scheduler would be one more thing to save, and a prepared one is stepped once a process.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from modern_llm.config import TrainingConfig


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Return the rate of optimizer step `step` (from 0) of `total`.

    Rises linearly over `warmup_steps`, reaching the peak at its last, then decays towards
    `min_learning_rate_ratio` of it, which step `total` would have: the last step still learns.
    """
    warmup = config.warmup_steps
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


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices and none on vectors (norms, biases).

    Fused: one kernel for all parameters, on a CPU too.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Write `rate` into every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def is_due(every: int, step: int, total: int, *, at_end: bool = False) -> bool:
    """Whether something that happens `every` so many steps happens after step `step` (counted from
    1)."""
    return step % every == 0 or (at_end and step == total)
