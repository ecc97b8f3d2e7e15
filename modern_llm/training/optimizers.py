"""Optimizers by the name that a configuration gives, and which of their groups a weight is in."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed.linked_optimizers import LinkedOptimizers, SplitWeights, make_masters
from modern_llm.distributed.runtime import Runtime

Group = dict[str, Any]

# Modules whose parameter `weight` is used in a matrix product, a convolution or a look-up.
OPERANDS = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
# Names of such weights in modules that a model defines itself: GPT-2's Conv1D (weight), stacked
# experts (gate_up_proj, w1), routers, recurrent gates (input_gate_weight), hyper-connections (fn),
# XLNet's attention. Not matched: A_log, D, time_decay, scale, sinks, biases.
OPERAND_NAME = re.compile(
    r"(.*_)?(weights?|proj|kernel|embed|emb|embeddings?|fn)|w[123]?|v1|[qkvor]", re.IGNORECASE
)


def check_optimizer(runtime: Runtime, config: TrainingConfig) -> None:
    """Refuse an optimizer, or a way to save memory, that cannot work here, before loading."""
    engine = "FSDP" if runtime.stage is None else f"ZeRO-{runtime.stage}"
    sharded = runtime.stage is not None or runtime.shards_weights
    missing = importlib.util.find_spec("bitsandbytes") is None
    rules = [
        (
            config.optimizer == "adamw_8bit" and missing,
            "train.optimizer adamw_8bit needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes",
        ),
        (
            config.optimizer != "adamw" and sharded,
            f"train.optimizer {config.optimizer} needs whole weights on each process, and {engine} "
            "steps pieces of them: use adamw, or accelerate_configs/ddp.yaml",
        ),
        (
            config.weights == "bfloat16" and sharded,
            f"train.weights bfloat16: {engine} keeps its own copies of the weights: leave it out "
            "(ZeRO's forwards read bfloat16 weights in any case), or use "
            "accelerate_configs/ddp.yaml",
        ),
        (
            config.gradient_checkpointing == "offload" and runtime.device.type == "cpu",
            "train.gradient_checkpointing offload needs a GPU: the host's memory is the device's; "
            "use true on this machine",
        ),
    ]
    problems = [text for broken, text in rules if broken]
    if problems:
        raise ConfigError(problems)


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


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of the trained parameters, and convert these to `train.weights`.

    Weight decay applies only to the parameters named by `decayed`.
    """
    names = decayed(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.weights == "bfloat16":
        masters = make_masters(model)
        trained = [(name, masters[p]) for name, p in trained]
        return SplitWeights(masters, _make(config, model, trained, names))
    return _make(config, model, trained, names)


def _make(
    config: TrainingConfig,
    model: nn.Module,
    trained: list[tuple[str, nn.Parameter]],
    names: set[str],
) -> torch.optim.Optimizer:
    """Return the optimizer of `trained` parameters, of which `names` decay."""
    make = MAKERS[config.optimizer]
    if config.optimizer != "muon":
        return make(config, _groups(config, trained, names))
    inner = _inside_layers(model)
    own = {n for n, p in trained if n in names and n in inner and p.ndim == 2}
    matrices = [(n, p) for n, p in trained if n in own]
    others = [(n, p) for n, p in trained if n not in own]
    parts = [make(config, _groups(config, matrices, names))] if matrices else []
    if others:
        parts.append(_adamw(config, _groups(config, others, names)))
    return LinkedOptimizers(parts)


def _groups(
    config: TrainingConfig, trained: list[tuple[str, nn.Parameter]], names: set[str]
) -> list[Group]:
    """Return the group that decays and the one that does not; empty ones are left out."""
    groups = [
        {
            "params": [p for name, p in trained if name in names],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in trained if name not in names], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _inside_layers(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are neither an embedding's nor the head's."""
    modules = list(model.modules())
    heads = [m.get_output_embeddings() for m in modules if hasattr(m, "get_output_embeddings")]
    tables = [m for m in modules if isinstance(m, nn.Embedding)]
    outside = {id(p) for m in (*heads, *tables) if m is not None for p in m.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in outside}


def _adamw(config: TrainingConfig, groups: list[Group]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=True, **_adam(config))


def _adamw_8bit(config: TrainingConfig, groups: list[Group]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit  # an extra, and slow to import

    return AdamW8bit(groups, **_adam(config))


def _muon(config: TrainingConfig, groups: list[Group]) -> torch.optim.Optimizer:
    # At the scale of AdamW's updates, so that one learning rate serves both.
    return torch.optim.Muon(groups, lr=_rate(config), adjust_lr_fn="match_rms_adamw")


def _adafactor(config: TrainingConfig, groups: list[Group]) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(groups, lr=_rate(config))


def _adam(config: TrainingConfig) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": _rate(config), "betas": betas, "eps": config.adam_epsilon}


def _rate(config: TrainingConfig) -> float:
    return config.learning_rate or 0.0  # set before every step


MAKERS: dict[str, Callable[[TrainingConfig, list[Group]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "muon": _muon,
    "adafactor": _adafactor,
}
"""`train.optimizer` -> what makes it from its groups; Muon takes the matrices of layers only."""
