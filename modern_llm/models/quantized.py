"""Weights of few bits (QLoRA): how exact their products are, and their real sizes."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn


def product_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """Return the least exact dtype in which the layers of `model` compute their products.

    Layers of four bits unpack their weights to `compute_dtype`; those of eight bits multiply
    integers, which is about as exact as bfloat16. Norms and residuals beside them are in `dtype`.
    """
    kinds = {getattr(module, "compute_dtype", None) for module in model.modules()}
    if has_int8(model):
        kinds.add(torch.bfloat16)
    kinds = {kind for kind in kinds if isinstance(kind, torch.dtype) and kind.is_floating_point}
    return max([dtype, *kinds], key=lambda kind: torch.finfo(kind).eps)


def has_int8(model: nn.Module) -> bool:
    """Whether `model` has layers of eight bits.

    They keep columns with outliers apart, and find these in the whole batch: other tokens of the
    batch change how a token is rounded.
    """
    return any(parameter.dtype == torch.int8 for parameter in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of a weight; one of four bits is packed, two values in a byte."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def elements(parameter: Tensor) -> int:
    """Return the number of values of a weight, unpacked."""
    return prod(shape_of(parameter))
