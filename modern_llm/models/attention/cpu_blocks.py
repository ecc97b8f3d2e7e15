"""Attention within trees on a CPU: one kernel call per unpadded part, without masks of whole rows.

A tree `[prefix | response | response]` is computed as one causal sequence of the prefix and first
response, then each other response as queries against the prefix and itself. Each part is split into
short ranges of queries, because the kernel computes whole rectangles and wastes what is above the
diagonal. Small trees share one call with a small mask. The blocks of a batch (`find_blocks`) are
found once and used by all layers.

Letters: R rows, L tokens of a row, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor

# Trees are merged up to this many tokens: the overhead of a call equals the work of about
# 96 x 96 scores.
MERGE_BELOW = 96
# Queries per call. For 256 x 256 scores, four calls of 64 queries took 0.7 of the time of one call,
# forward and backward; 32 queries gained nothing more. Above eight cores ranges are longer, because
# the cores share a call.
QUERIES = 64

Visible = Callable[[Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Block:
    """Queries `[start, stop)` of a row, with the keys that they may see.

    Keys are `[prefix, prefix_stop)`, which may be empty, then `[own, stop)`.
    """

    row: int
    start: int
    stop: int
    prefix: int
    prefix_stop: int
    own: int
    mask: Tensor | None
    """(queries, keys) additive; None is causal, with `own` = `start` and an empty prefix range."""

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the part (1, H, keys, E) of (R, H, L, E) that holds the keys."""
        own = tensor[self.row : self.row + 1, :, self.own : self.stop]
        if self.prefix == self.prefix_stop:
            return own
        prefix = tensor[self.row : self.row + 1, :, self.prefix : self.prefix_stop]
        return torch.cat([prefix, own], dim=2)

    def queries(self, tensor: Tensor) -> Tensor:
        """Return the part (1, H, queries, E) of (R, H, L, E)."""
        return tensor[self.row : self.row + 1, :, self.start : self.stop]


@dataclass(frozen=True)
class Run:
    """Tokens `[start, stop)` of a row that share tree and branch."""

    row: int
    start: int
    stop: int
    tree: int
    branch: int


def runs_of(segments: Tensor) -> list[Run]:
    """Return the runs of (R, L, 2) segments in order, without padding."""
    rows, length, _ = segments.shape
    flat = segments.reshape(-1, 2)
    starts = torch.ones(len(flat), dtype=torch.bool)
    starts[1:] = (flat[1:] != flat[:-1]).any(-1)
    starts[::length] = True
    at = starts.nonzero().flatten()
    ends = [*at[1:].tolist(), rows * length]
    found = zip(at.tolist(), ends, flat[at].tolist(), strict=True)
    return [
        Run(start // length, start % length, start % length + end - start, tree, branch)
        for start, end, (tree, branch) in found
        if tree >= 0
    ]


def find_blocks(
    segments: Tensor,
    positions: Tensor,
    window: int | None,
    dtype: torch.dtype,
    visible: Visible,
    merge_below: int = MERGE_BELOW,
) -> tuple[Block, ...]:
    """Split rows into blocks that together compute exactly the visible part.

    Args:
        segments, positions, window: as in `attention.visible`, on the CPU.
        dtype: of the masks.
        visible: `attention.visible`, which makes the small masks.
        merge_below: trees of a row with fewer tokens share a call.
    """
    blocks: list[Block] = []

    def masked(row: int, start: int, stop: int) -> Block:
        here = (slice(row, row + 1), slice(start, stop))
        seen = visible(segments[here], positions[here], window)[0]
        return Block(row, start, stop, start, start, start, additive(seen, dtype))

    pending: tuple[int, int, int] | None = None
    for row, start, stop, runs in _trees(runs_of(segments)):
        # A window as long as the tree has no effect.
        cut = window is not None and stop - start > window
        single = len(runs) == 1 or (len(runs) == 2 and runs[0].branch == 0)
        alone = (single and not cut) or stop - start >= merge_below
        if pending and (alone or pending[0] != row or stop - pending[1] > merge_below):
            blocks.append(masked(*pending))
            pending = None
        if not alone:
            pending = (row, pending[1] if pending else start, stop)
        elif cut:
            blocks.append(masked(row, start, stop))
        else:
            blocks += _of_tree(runs, dtype)
    if pending:
        blocks.append(masked(*pending))
    return tuple(blocks)


def _trees(runs: Sequence[Run]) -> Iterator[tuple[int, int, int, list[Run]]]:
    """Yield (row, start, stop, runs) of each tree."""
    for (row, _), members in groupby(runs, key=lambda run: (run.row, run.tree)):
        tree = list(members)
        if any(run.branch == 0 for run in tree[1:]) or len({r.branch for r in tree}) < len(tree):
            raise ValueError("a tree must be its prefix (branch 0), then each other branch once")
        yield row, tree[0].start, tree[-1].stop, tree


def _of_tree(runs: list[Run], dtype: torch.dtype) -> list[Block]:
    """Return the blocks of one tree without a window: prefix and first response, then the rest."""
    start = runs[0].start
    prefix_stop = runs[0].stop if runs[0].branch == 0 else start
    whole = len(runs) > 1 and runs[0].branch == 0
    blocks = _ranges(runs[0], start, runs[1 if whole else 0].stop, start, dtype)
    for run in runs[2 if whole else 1 :]:
        blocks += _ranges(run, start, run.stop, prefix_stop, dtype)
    return blocks


def _ranges(run: Run, prefix: int, stop: int, prefix_stop: int, dtype: torch.dtype) -> list[Block]:
    """Split the queries from the start of `run` to `stop` into ranges of about equal length.

    They see each other causally, and all of `[prefix, prefix_stop)`.
    """
    own, seen = run.start, prefix_stop - prefix
    count = max(1, round((stop - own) / max(QUERIES, 8 * torch.get_num_threads())))
    edges = [own + (stop - own) * at // count for at in range(count + 1)]
    blocks = []
    for start, end in zip(edges, edges[1:], strict=False):
        size, mask = end - start, None
        if seen or start > own:
            mask = torch.zeros(size, seen + end - own, dtype=dtype)
            mask[:, seen + start - own :] = torch.full(
                (size, size), float("-inf"), dtype=dtype
            ).triu_(1)
        blocks.append(Block(run.row, start, end, prefix, prefix_stop, own, mask))
    return blocks


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `seen`, -inf elsewhere; SDPA would convert booleans again in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def has_kernel() -> bool:
    """Whether this torch version has the CPU flash kernel, which is not public API."""
    ops = torch.ops.aten
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return hasattr(ops, name) and hasattr(ops, f"{name}_backward")


@lru_cache(maxsize=1)
def takes_groups() -> bool:
    """Whether the kernel reads keys and values of fewer heads than queries, as a trial shows.

    Repeating them for every head costs a copy of each, of their gradients, and memory.
    """
    draw = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(1, 4, 8, 8, generator=draw) for _ in range(2))
    few = [torch.randn(1, 2, 8, 8, generator=draw) for _ in range(2)]
    blocks = (Block(0, 0, 8, 0, 0, 0, None),)

    def run(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        with torch.enable_grad():
            out = BlockAttention.apply(*leaves, blocks, None)
            return [out, *torch.autograd.grad(out, leaves, grad)]

    try:
        found = run(query, *few)
    except RuntimeError:
        return False
    out, by_query, *wide = run(query, *(tensor.repeat_interleave(2, dim=1) for tensor in few))
    expected = [out, by_query, *(grad.unflatten(1, (2, 2)).sum(2) for grad in wide)]
    return all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5)
        for a, b in zip(found, expected, strict=True)
    )


class BlockAttention(torch.autograd.Function):
    """Attention over blocks with the CPU's flash kernel.

    An autograd function, because the gradient of each slice would otherwise be a whole row, mostly
    zeros.
    """

    @staticmethod
    def forward(ctx, query, key, value, blocks, scale):  # noqa: ANN001
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        rows, heads, length, width = query.shape
        out = query.new_zeros(rows, length, heads, width).transpose(1, 2)
        normalisers = []
        for block in blocks:
            part, normaliser = kernel(
                block.queries(query),
                block.keys(key),
                block.keys(value),
                0.0,
                block.mask is None,
                attn_mask=block.mask,
                scale=scale,
            )
            block.queries(out).copy_(part)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # noqa: ANN001
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, *normalisers = ctx.saved_tensors
        rows, heads, length, width = query.shape
        grads = [
            query.new_zeros(rows, length, heads, width).transpose(1, 2)
            for heads in (query.shape[1], key.shape[1], value.shape[1])
        ]
        for block, normaliser in zip(ctx.blocks, normalisers, strict=True):
            parts = kernel(
                block.queries(grad),
                block.queries(query),
                block.keys(key),
                block.keys(value),
                block.queries(out),
                normaliser,
                0.0,
                block.mask is None,
                attn_mask=block.mask,
                scale=ctx.scale,
            )
            shared = block.prefix_stop - block.prefix
            block.queries(grads[0]).copy_(parts[0])
            for total, part in zip(grads[1:], parts[1:], strict=True):
                row = total[block.row : block.row + 1]
                row[:, :, block.own : block.stop] += part[:, :, shared:]
                if shared:
                    row[:, :, block.prefix : block.prefix_stop] += part[:, :, :shared]
        return *grads, None, None


def blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Attention over blocks with any differentiable `attend(query, key, value, mask)`.

    For soft-caps and dropout, which the kernel does not have.

    Returns:
        (R, H, L, E); zero where there is padding.
    """
    rows, heads, length, width = query.shape
    parts = {}
    for block in blocks:
        size = block.stop - block.start
        mask = block.mask
        if mask is None:
            mask = query.new_full((size, size), float("-inf")).triu_(1)
        parts[block.row, block.start] = attend(
            block.queries(query), block.keys(key), block.keys(value), mask
        )
    lines = []
    for row in range(rows):
        at = 0
        for start in sorted(start for r, start in parts if r == row):
            if start > at:
                lines.append(query.new_zeros(1, heads, start - at, width))
            lines.append(parts[row, start])
            at = start + parts[row, start].shape[2]
        if at < length:
            lines.append(query.new_zeros(1, heads, length - at, width))
    return torch.cat(lines, dim=2).view(heads, rows, length, width).transpose(0, 1)
