"""Comparison of a backend's kernels with dense attention, for the calls that a model makes.

It needs no model: queries, keys and values are random, with the heads, widths, scaling and soft-cap
of each layer. So it runs on the device and in the dtype of the run, forward and backward, also
where the weights of the model are on the host or sharded (ZeRO-3).

Letters: R rows, L tokens of a row, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from modern_llm.config.printable import first_line
from modern_llm.models.attention.prefix_tree import Backend, Call, TreeMasks, tree_attention

# Trees [prefix, responses ...] of two rows, over several blocks of 128 tokens: some blocks are
# visible as a whole, some in part, some not at all. The rest of a row is padding.
ROWS = (((150, 140, 3), (2, 60, 20)), ((0, 130), (40,), (1, 1, 170)))
LENGTH = 384
# Windows are at most this long, so that rows exceed them; kernels are the same for any window.
LONGEST_WINDOW = 96
# Largest difference of a token's result or gradient from dense attention in float32, relative to
# its norm, by the dtype of the kernels.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


def why_not(
    backend: Backend, calls: Iterable[Call], device: torch.device, dtype: torch.dtype
) -> str:
    """Return why `backend` may not compute `calls` on `device` in `dtype`, or ""."""
    for call in sorted(calls, key=str):
        try:
            worst = _difference(backend, call, device, dtype)
        except Exception as error:  # a kernel may raise anything
            worst, reason = float("inf"), f"fails ({first_line(error)})"
        else:
            reason = f"differs from dense attention by {worst:.1%}"
        if not worst <= TOLERANCE[dtype]:
            name = str(dtype).removeprefix("torch.")
            return (
                f"its kernel for {call.heads} query heads and {call.key_heads} key heads of "
                f"{call.width} in {name} {reason}"
            )
    return ""


def _difference(backend: Backend, call: Call, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference of a token's result and gradients, relative to its norm."""
    segments, positions = (tensor.to(device) for tensor in _rows())
    generator = torch.Generator().manual_seed(0)
    shapes = [(call.heads, call.width), (call.key_heads, call.width)]
    shapes += [(call.key_heads, call.value_width), (call.heads, call.value_width)]
    *inputs, upstream = (
        torch.randn(len(ROWS), heads, LENGTH, width, generator=generator).to(device, dtype)
        for heads, width in shapes
    )
    real = segments[..., 0] >= 0
    upstream = upstream.transpose(1, 2) * real[..., None, None]
    found, expected = (
        _results(name, call, [t.to(kind) for t in inputs], upstream.to(kind), segments, positions)
        for name, kind in ((backend, dtype), ("mask", torch.promote_types(dtype, torch.float32)))
    )
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        off, norm = (
            (t[real]).flatten(1).norm(dim=1) for t in (ours.to(theirs.dtype) - theirs, theirs)
        )
        worst = max(worst, float((off / norm.clamp(min=float(norm.mean()))).max()))
        worst = worst if bool(torch.isfinite(off).all()) else float("inf")
    return worst


def _results(
    backend: Backend,
    call: Call,
    inputs: list[Tensor],
    upstream: Tensor,
    segments: Tensor,
    positions: Tensor,
) -> list[Tensor]:
    """Return the attention and its gradients of query, key and value, each (R, L, H, E)."""
    inputs = [tensor.requires_grad_() for tensor in inputs]
    window = call.window and min(call.window, LONGEST_WINDOW)
    masks = TreeMasks(segments, positions, inputs[0].dtype, backend)
    with torch.enable_grad(), torch.autocast(segments.device.type, enabled=False):
        out, _ = tree_attention(
            nn.Module(),
            *inputs,
            None,
            scaling=call.scaling,
            sliding_window=window,
            softcap=call.softcap,
            tree=masks,
        )
        gradients = torch.autograd.grad(out, inputs, upstream)
    return [out.detach(), *(gradient.transpose(1, 2) for gradient in gradients)]


def _rows() -> tuple[Tensor, Tensor]:
    """Return segments (R, L, 2) and positions (R, L) of `ROWS`."""
    segments = torch.full((len(ROWS), LENGTH, 2), -1)
    positions = torch.zeros(len(ROWS), LENGTH, dtype=torch.long)
    for row, trees in enumerate(ROWS):
        at = 0
        for tree, sizes in enumerate(trees):
            for branch, size in enumerate(sizes):
                start = sizes[0] if branch else 0
                segments[row, at : at + size] = torch.tensor([tree, branch])
                positions[row, at : at + size] = torch.arange(start, start + size)
                at += size
    return segments, positions
