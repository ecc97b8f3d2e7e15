"""Split of a float32 tensor into three tensors that bfloat16 represents exactly, and its inverse.

Wrappers such as FSDP's may cast the outputs of the module that they wrap to 16 bits. A log-prob of
-2118.95 then becomes -2112. Its three parts survive the cast, and so does the gradient on its way
back. Values in float16 would not: its range is too small.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(values: Tensor) -> Tensor:
    """Return (3, N) parts of (N,) values, in their dtype, with the values as their exact sum.

    The parts of float32 values have eight significant bits each, as many as bfloat16.
    """
    return _Split.apply(values)


def join(parts: Tensor) -> Tensor:
    """Return the values (N,) of `split`, in at least float32."""
    return _Join.apply(parts)


def _split(values: Tensor) -> Tensor:
    first = values.bfloat16().to(values.dtype)
    rest = torch.where(first.isfinite(), values - first, 0.0)  # inf - inf is NaN
    second = rest.bfloat16().to(values.dtype)
    return torch.stack([first, second, rest - second])


def _join(parts: Tensor) -> Tensor:
    first, second, third = parts.to(torch.promote_types(parts.dtype, torch.float32))
    return third + second + first


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):  # noqa: ANN001
        return _split(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return _join(grad)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts):  # noqa: ANN001
        ctx.dtype = parts.dtype
        return _join(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        return _split(grad).to(ctx.dtype)
