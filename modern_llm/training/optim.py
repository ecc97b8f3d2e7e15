"""AdamW with two parameter groups, and the learning rate as a pure function of the step.

There is no scheduler object: it would add state to save, and Accelerate steps a prepared scheduler
once per process.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from modern_llm.config import TrainingConfig

# Modules whose parameter `weight` is used in a matrix product, a convolution or a look-up.
OPERANDS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# Names of such weights in modules that a model defines itself: GPT-2's Conv1D (weight), stacked
# experts (gate_up_proj, w1), routers, recurrent gates (input_gate_weight), hyper-connections (fn),
# XLNet's attention. Not matched: A_log, D, time_decay, scale, sinks, biases.
OPERAND_NAME = re.compile(
    r"(.*_)?(weights?|proj|kernel|embed|emb|embeddings?|fn)|w[123]?|v1|[qkvor]", re.IGNORECASE
)


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


def decayed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay applies to.

    These are the weights of matrix products, convolutions and embeddings, experts included. Biases,
    norms and state-space parameters are excluded, even those with two or more dimensions.
    """
    owners: dict[int, bool] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # a tied parameter belongs to several modules
                owners[id(parameter)] = owners.get(id(parameter), False) or _is_operand(
                    path, module, name, parameter
                )
    return {name for name, parameter in model.named_parameters() if owners[id(parameter)]}


def _is_operand(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is the weight of a matrix product, a convolution or a look-up."""
    if getattr(parameter, "_no_weight_decay", False):  # set by Mamba
        return False
    if isinstance(module, OPERANDS):
        return name == "weight"
    attribute = path.rpartition(".")[2]
    if isinstance(module, nn.ParameterDict):  # PEFT's embedding adapters: lora_embedding_A
        return attribute.startswith("lora_")
    if "norm" in type(module).__name__.lower() or "norm" in attribute.lower():
        return False
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return sum(size > 1 for size in shape) >= 2 and bool(OPERAND_NAME.fullmatch(name))


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return fused AdamW with weight decay only on the parameters named by `decayed`."""
    names = decayed(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in trained if name in names],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained if name not in names], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate or 0.0,  # set before every step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set `rate` in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def is_due(every: int, step: int, total: int, *, at_end: bool = False) -> bool:
    """Whether an action with interval `every` is due after step `step` (counted from 1)."""
    return step % every == 0 or (at_end and step == total)
