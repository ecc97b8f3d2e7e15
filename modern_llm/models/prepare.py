"""What is done to a loaded model before it trains: dropout off, layers compiled. Called by the
stages."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout and router jitter to zero, so that two forwards of one policy agree.

    The model can then stay in training mode, which recomputation of activations needs. Attention
    keeps its probability as a number on the module, not as a `Dropout`.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or "jitter" in name):
                setattr(module, name, 0.0)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the longest list of layers in the model, which is its decoder."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, and make the rest again."""
    # Renamed in transformers 5.2x; the old name is there until version 6.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": False})


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` each decoder layer in place; one graph serves all, lengths are dynamic."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
