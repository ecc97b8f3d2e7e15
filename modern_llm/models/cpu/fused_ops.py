"""Norms, gated products and rotary positions with less memory traffic, for a CPU in float32.

`transformers` writes them as many small operations. On a CPU each of them reads all activations,
and autograd keeps the intermediate results. Here each is one function with a backward of its own.
`patch_cpu_ops` installs them where a trial with random numbers gives the same values.
`capabilities` then checks the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Absolute difference of two float32 results that sum in another order.
TOLERANCE = 1e-5


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (weight + offset), over the last dimension."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):  # noqa: ANN001
        gain = weight + offset if offset else weight
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        ctx.offset = offset
        return (x * scale).mul_(gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        x, weight, scale = ctx.saved_tensors
        # Always a copy: weights mapped from a file may have any alignment, and a matrix-vector
        # product rounds differently at another alignment.
        gain = weight + ctx.offset
        width = x.shape[-1]
        flat, grad, scale = x.reshape(-1, width), grad.reshape(-1, width), scale.reshape(-1, 1)
        # dx = s (g dy - x s^2 mean(g dy x)), dg = sum(s dy x), with s = scale
        product = grad * flat
        grad_weight = product.t().mv(scale[:, 0]) if ctx.needs_input_grad[1] else None
        mean = product.mv(gain).unsqueeze_(-1).mul_(scale.square()).div_(-width)
        grad_x = torch.mul(grad, gain, out=product).addcmul_(flat, mean).mul_(scale)
        return grad_x.view_as(x), grad_weight, None, None


class _SiluProduct(torch.autograd.Function):
    """silu(gate) * up; the backward recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate, up):  # noqa: ANN001
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _DownProduct(torch.autograd.Function):
    """(silu(gate) * up) W^T + b; the backward recomputes the product instead of keeping it."""

    @staticmethod
    def forward(ctx, gate, up, weight, bias):  # noqa: ANN001
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        gate, up, weight = ctx.saved_tensors
        silu = F.silu(gate)
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = rows.t().mm((silu * up).reshape(len(rows), -1))
        if ctx.needs_input_grad[3]:
            grad_bias = rows.sum(0)
        grad_product = rows.mm(weight).view_as(gate)
        grad_up = silu.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        return grad_gate, grad_up, grad_weight, grad_bias


class _Rotary(torch.autograd.Function):
    """Rotate the halves of each head by its position's angle; the backward rotates back."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):  # noqa: ANN001
        ctx.save_for_backward(cos, sin)
        return _rotated(query, cos, sin, 1), _rotated(key, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, query, key):  # noqa: ANN001
        cos, sin = ctx.saved_tensors
        return _rotated(query, cos, sin, -1), _rotated(key, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """x cos + sign * rotate_half(x) sin, for tables whose halves are equal."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out


def rotary(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Rotate query (R, H, L, E) and key by the tables cos, sin (R, L, E)."""
    return _Rotary.apply(query, key, cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim))


@torch.no_grad()
def patch_cpu_ops(model: nn.Module) -> dict[str, int]:
    """Replace operations of `model` in place by the functions of this file; return their counts.

    Modules keep their class, parameters, names and hooks: only `forward` is set on the instance.
    """
    counts = {"norms": 0, "products": 0, "rotary": 0}
    rotary_fits: dict[Callable, bool] = {}
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            counts["norms"] += _patch_norm(module)
        elif hasattr(module, "gate_proj"):
            counts["products"] += _patch_product(module)
        elif type(module).__name__.endswith("Attention"):
            counts["rotary"] += _patch_rotary(module, rotary_fits)
    return counts


def restore_ops(model: nn.Module) -> None:
    """Undo `patch_cpu_ops`."""
    for module in model.modules():
        if is_patched(module):
            del module.forward


def is_patched(module: nn.Module) -> bool:
    """Whether `set_forward` has replaced the `forward` of this module."""
    return getattr(module.__dict__.get("forward"), "patched", False)


def set_forward(module: nn.Module, function: Callable) -> None:
    """Replace the `forward` of this module until `restore_ops`."""
    function.patched = True
    module.forward = MethodType(function, module)


def _patch_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return False
    if weight.dtype != torch.float32:
        return False
    original = type(module).forward
    trials = [numbers(3, len(weight)) * size for size in (1e-3, 1.0, 50.0)]
    for offset in (0.0, 1.0):
        if all(same(original(module, x), _RMSNorm.apply(x, weight, eps, offset)) for x in trials):
            break
    else:
        return False

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return original(self, x)
        return _RMSNorm.apply(x, self.weight, eps, offset)

    set_forward(module, forward)
    return True


def _patch_product(module: nn.Module) -> bool:
    if not is_gated_product(module):
        return False
    original = type(module).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != torch.float32:
            return self.down_proj(F.silu(gate) * up)
        if _is_bare(self.down_proj):
            return _DownProduct.apply(gate, up, self.down_proj.weight, self.down_proj.bias)
        return self.down_proj(_SiluProduct.apply(gate, up))

    x = numbers(3, module.gate_proj.in_features)
    if not same(original(module, x), forward(module, x)):
        return False
    set_forward(module, forward)
    return True


def _is_bare(linear: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else: no adapter, and no hook as under ZeRO-3."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks
    return type(linear) is nn.Linear and not (hooks or linear._backward_pre_hooks)


def _patch_rotary(module: nn.Module, fits: dict[Callable, bool]) -> bool:
    """Make this module's `forward` call `rotary` in place of its file's own function.

    That function is a global of the file that defines the architecture. Replacing it would change
    every model of the process; a copy of `forward` with its own globals changes only this module.
    """
    original = type(module).forward
    name = "apply_rotary_pos_emb"
    if not isinstance(original, FunctionType) or name not in original.__code__.co_names:
        return False
    theirs = original.__globals__.get(name)
    if theirs not in fits:
        fits[theirs] = callable(theirs) and _rotary_is(theirs)
    if not fits[theirs]:
        return False
    copy = FunctionType(
        original.__code__,
        original.__globals__ | {name: _rotary_or(theirs)},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    set_forward(module, copy)
    return True


def _rotary_or(theirs: Callable) -> Callable:
    def either(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: int, **named: int):  # noqa: ANN202
        # Tables narrower than the head rotate only a part of it.
        whole = query.dtype == torch.float32 and cos.shape[-1] == query.shape[-1]
        return (rotary if whole else theirs)(query, key, cos, sin, *args, **named)

    return either


def _rotary_is(theirs: Callable) -> bool:
    query, key = numbers(2, 3, 5, 8), numbers(2, 1, 5, 8)
    angles = numbers(2, 5, 4).repeat(1, 1, 2)
    tables = angles.cos(), angles.sin()
    try:
        found = theirs(query, key, *tables)
    except Exception:  # a function of the same name with another signature
        return False
    return all(same(a, b) for a, b in zip(found, rotary(query, key, *tables), strict=True))


def is_gated_product(module: nn.Module | None) -> bool:
    """Whether a module has the three float32 projections of a gated feed-forward layer."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(p, nn.Linear) and p.weight.dtype == torch.float32 for p in parts)


def numbers(*shape: int) -> Tensor:
    """Return the same random numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def same(a: object, b: Tensor) -> bool:
    """Return whether two results of a trial agree up to the order of sums."""
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, 1e-4, TOLERANCE)
