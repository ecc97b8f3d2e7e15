"""Preparation of a loaded model for training: dropout off, recomputation, compiled layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from modern_llm.config.errors import UserError
from modern_llm.models.attention.flex import set_up_compiler
from modern_llm.models.mixers import keep_routes, mixers_of


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout and skipped layer, so that two forwards of one policy agree.

    The model can then stay in training mode, which activation recomputation needs. `modes.settle`
    switches off everything else that differs in training mode.
    """
    for module, name in dropouts(model):
        setattr(module, name, 0.0)


def dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules with dropout, each with the name of its probability attribute.

    Attention layers hold the probability as a float, not as a `Dropout` module.
    """
    found = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            found.append((module, "p"))
        found += [
            (module, name)
            for name, value in vars(module).items()
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop")
        ]
    return found


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the longest list of layers in the model, which is its decoder."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def recompute_activations(
    model: PreTrainedModel, *, selective: bool = False, offload: bool = False
) -> None:
    """Keep only each layer's input for the backward pass, and recompute the rest.

    Args:
        selective: also keep the results of matrix products and attention, so that only cheap
            operations (norms, rotary positions, gated products, sums) are recomputed.
        offload: keep the inputs in the host's memory.

    Raises:
        UserError: `offload`, and the model recomputes in a way of its own.
    """
    options: dict[str, object] = {"use_reentrant": False}
    contexts = partial(create_selective_checkpoint_contexts, _kept) if selective else None
    if mixers_of(model):
        contexts = keep_routes(contexts)
    if contexts is not None:
        options["context_fn"] = contexts
    # Renamed in transformers 5.2x; the old name exists until version 6.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(options)
    layers = [m for m in model.modules() if hasattr(m, "_gradient_checkpointing_func")]
    if offload and not layers:
        raise UserError(
            f"train.gradient_checkpointing offload: {type(model).__name__} recomputes activations "
            "in a way of its own: use true"
        )
    for layer in layers if offload else ():
        layer._gradient_checkpointing_func = partial(
            _with_inputs_on_host, layer._gradient_checkpointing_func
        )


def _with_inputs_on_host(checkpoint: Callable[..., Any], *of: object, **more: object) -> Any:
    # The hooks see what `checkpoint` saves of its inputs; inside it has hooks of its own.
    with saved_tensors_hooks(_to_host, _to_device):
        return checkpoint(*of, **more)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    # Pinned, so that the device copies by itself while the host prepares the next layer.
    pinned = tensor.device.type == "cuda"
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return tensor.device, copy.copy_(tensor.detach(), non_blocking=pinned)


def _to_device(kept: tuple[torch.device, Tensor]) -> Tensor:
    device, copy = kept
    return copy.to(device, non_blocking=True)


# By name, because some exist only on some devices, and FlexAttention is not an aten operator: in a
# plain layer it is a compiled region, in a compiled layer an operator of its own.
_COSTLY = frozenset(
    "mm addmm bmm baddbmm _grouped_mm flex_attention inductor_compiled_code".split()
)


def _kept(context: object, operator: Any, *of: object, **more: object) -> CheckpointPolicy:
    """Return the policy of selective recomputation for one operator."""
    name = getattr(operator, "_name", str(operator)).rpartition("::")[2].partition(".")[0]
    costly = name in _COSTLY or name.startswith("_scaled_dot_product")
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def compile_layers(model: PreTrainedModel) -> None:
    """`torch.compile` each decoder layer in place; one graph serves all, lengths are dynamic.

    Everything except lengths that changes between forwards must be hidden from the compiler
    (`attention.Parts`), or each forward is compiled again.
    """
    set_up_compiler()
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)
