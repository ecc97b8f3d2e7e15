"""Attention within trees on a CPU: one call for each unpadded part, and no mask of a whole row.

A tree `[trunk | branch | branch]` is trunk and first branch as one causal sequence, then each other
branch as queries against the trunk and itself. Each of these is cut into short ranges of queries:
the kernel computes whole rectangles, so that a range sees little that lies above the diagonal.
Trees too small for calls of their own share one with a small mask. Called by `attention`; which
parts a batch has (`find_blocks`) is found once and serves all layers.

Letters: R rows, L tokens of a row, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

# Trees are put together until they have this many tokens: a call costs about as much as a square of
# this side, so that smaller ones would be mostly overhead.
MERGE_BELOW = 96
# Queries of one call. Of a square of 256 keys, four calls of 64 queries took 0.7 of the time of
# one, forward and backward; 32 gained nothing more. Cores beyond eight get longer ranges to share.
QUERIES = 64

Visible = Callable[[Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class Block:
    """Queries `[start, stop)` of a row, and the keys that they may see.

    Keys are `[own, stop)`, after those of `[trunk, trunk_stop)` where that is not empty.
    """

    row: int
    start: int
    stop: int
    trunk: int
    trunk_stop: int
    own: int
    mask: Tensor | None
    """(queries, keys) additive; None is causal, where `own` is `start` and there is no trunk."""

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the part (1, H, keys, E) of (R, H, L, E) that the queries may see."""
        own = tensor[self.row : self.row + 1, :, self.own : self.stop]
        if self.trunk == self.trunk_stop:
            return own
        trunk = tensor[self.row : self.row + 1, :, self.trunk : self.trunk_stop]
        return torch.cat([trunk, own], dim=2)

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
    """Return the runs of (R, L, 2) segments in order, padding left out."""
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
    """Cut rows into blocks that together compute exactly the visible part.

    Args:
        segments, positions, window: as in `attention.visible`, on the CPU.
        dtype: of the masks.
        visible: `attention.visible`, asked for the small masks.
        merge_below: tokens below which trees of a row share a call.
    """
    blocks: list[Block] = []

    def masked(row: int, start: int, stop: int) -> Block:
        here = (slice(row, row + 1), slice(start, stop))
        seen = visible(segments[here], positions[here], window)[0]
        return Block(row, start, stop, start, start, start, additive(seen, dtype))

    pending: tuple[int, int, int] | None = None
    for row, start, stop, runs in _trees(runs_of(segments)):
        # A window that no token of the tree reaches past is none.
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
            raise ValueError("a tree must be its trunk, then each of its branches once")
        yield row, tree[0].start, tree[-1].stop, tree


def _of_tree(runs: list[Run], dtype: torch.dtype) -> list[Block]:
    """Blocks of one tree without a window: trunk and first branch causal, then branch by branch."""
    start = runs[0].start
    trunk_stop = runs[0].stop if runs[0].branch == 0 else start
    whole = len(runs) > 1 and runs[0].branch == 0
    blocks = _ranges(runs[0], start, runs[1 if whole else 0].stop, start, dtype)
    for run in runs[2 if whole else 1 :]:
        blocks += _ranges(run, start, run.stop, trunk_stop, dtype)
    return blocks


def _ranges(run: Run, trunk: int, stop: int, trunk_stop: int, dtype: torch.dtype) -> list[Block]:
    """Cut the queries from the start of `run` to `stop`, which see each other causally and all of
    `[trunk, trunk_stop)`, into ranges of about equal length."""
    own, seen = run.start, trunk_stop - trunk
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
        blocks.append(Block(run.row, start, end, trunk, trunk_stop, own, mask))
    return blocks


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where `seen`, -inf elsewhere: SDPA would convert booleans in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def has_kernel() -> bool:
    """Whether this torch has the CPU kernel under the name that is used here (not a public one)."""
    ops = torch.ops.aten
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return hasattr(ops, name) and hasattr(ops, f"{name}_backward")


class BlockAttention(torch.autograd.Function):
    """Attention over blocks by the CPU's flash kernel.

    A function of its own, because slices in autograd would make a gradient of the whole row, full
    of zeros, for every block.
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
            shared = block.trunk_stop - block.trunk
            block.queries(grads[0]).copy_(parts[0])
            for total, part in zip(grads[1:], parts[1:], strict=True):
                row = total[block.row : block.row + 1]
                row[:, :, block.own : block.stop] += part[:, :, shared:]
                if shared:
                    row[:, :, block.trunk : block.trunk_stop] += part[:, :, :shared]
        return *grads, None, None


def blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Sequence[Block],
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The same by any differentiable `attend(query, key, value, mask)`: soft-cap, dropout.

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
