"""AdamW over two groups, and the learning rate as a pure function of the step. No scheduler object
exists.

A scheduler would be one more thing to save, and a prepared one is stepped once a process.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from modern_llm.config import TrainingConfig

# Modules whose parameter `weight` is the operand of a product, a convolution or a look-up.
OPERANDS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# Names of such operands in modules of the models' own: GPT-2's Conv1D (weight), stacked experts
# (gate_up_proj, w1), routers, recurrent gates (input_gate_weight), hyper-connections (fn), XLNet's
# attention. Others (A_log, D, time_decay, scale, sinks, every bias) are none.
OPERAND_NAME = re.compile(
    r"(.*_)?(weights?|proj|kernel|embed|emb|embeddings?|fn)|w[123]?|v1|[qkvor]", re.IGNORECASE
)


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


def decayed(model: nn.Module) -> set[str]:
    """Return the names of the parameters that weight decay applies to.

    These are the weights of matrix products, of convolutions and of embeddings, experts included. A
    bias, a norm or a parameter of a state space is none, however many dimensions it has.
    """
    owners: dict[int, bool] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # one that is tied belongs to several modules
                owners[id(parameter)] = owners.get(id(parameter), False) or _is_operand(
                    path, module, name, parameter
                )
    return {name for name, parameter in model.named_parameters() if owners[id(parameter)]}


def _is_operand(path: str, module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a module is the weight of a product, a convolution or a look-up."""
    if getattr(parameter, "_no_weight_decay", False):  # how Mamba marks its own
        return False
    if isinstance(module, OPERANDS):
        return name == "weight"
    attribute = path.rpartition(".")[2]
    if isinstance(module, nn.ParameterDict):  # PEFT's adapters of embeddings: lora_embedding_A
        return attribute.startswith("lora_")
    if "norm" in type(module).__name__.lower() or "norm" in attribute.lower():
        return False
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return sum(size > 1 for size in shape) >= 2 and bool(OPERAND_NAME.fullmatch(name))


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with decay on the parameters that `decayed` names and none on the others.

    Fused: one kernel for all parameters, on a CPU too.
    """
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
