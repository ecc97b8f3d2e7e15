"""Attention within trees on a CPU: one kernel call per unpadded part, without masks of whole rows.

A tree `[prefix | response | response]` is computed as one causal sequence of the prefix and first
response, then each other response as queries against the prefix and itself. Where responses share
more than the prefix, each chain of nodes is such a sequence. Each part is split into
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

from modern_llm.models.attention.paths import paths

# Trees are merged up to this many tokens: the overhead of a call equals the work of about
# 96 x 96 scores.
MERGE_BELOW = 96
# Queries per call. For 256 x 256 scores, four calls of 64 queries took 0.7 of the time of one call,
# forward and backward; 32 queries gained nothing more. Above eight cores ranges are longer, because
# the cores share a call.
QUERIES = 64

Visible = Callable[[Tensor, Tensor, int | None], Tensor]
Span = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """Queries `[start, stop)` of a row, with the keys that they may see.

    Keys are the ranges `above`, of the nodes above the queries', then `[own, stop)`.
    """

    row: int
    start: int
    stop: int
    above: tuple[Span, ...]
    own: int
    mask: Tensor | None
    """(queries, keys) additive; None is causal, with `own` = `start` and nothing above."""

    @property
    def spans(self) -> tuple[Span, ...]:
        """The ranges of the keys, in order."""
        return (*self.above, (self.own, self.stop))

    def keys(self, tensor: Tensor) -> Tensor:
        """Return the part (1, H, keys, E) of (R, H, L, E) that holds the keys."""
        row = tensor[self.row : self.row + 1]
        parts = [row[:, :, start:stop] for start, stop in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add `part` (1, H, keys, E) to the places in (R, H, L, E) that it belongs to."""
        row, at = total[self.row : self.row + 1], 0
        for start, stop in self.spans:
            row[:, :, start:stop] += part[:, :, at : at + stop - start]
            at += stop - start

    def queries(self, tensor: Tensor) -> Tensor:
        """Return the part (1, H, queries, E) of (R, H, L, E)."""
        return tensor[self.row : self.row + 1, :, self.start : self.stop]


@dataclass(frozen=True)
class Run:
    """Tokens `[start, stop)` of a row that share tree and node; `last` as in `paths`."""

    row: int
    start: int
    stop: int
    tree: int
    node: int
    last: int

    def above(self, other: Run) -> bool:
        """Whether a later run of the same tree sees this one."""
        return self.node <= other.node <= self.last


def runs_of(segments: Tensor) -> list[Run]:
    """Return the runs of (R, L, 2) or (R, L, 3) segments in order, without padding."""
    rows, length, _ = segments.shape
    flat = torch.stack(paths(segments), -1).view(-1, 3)
    starts = torch.ones(len(flat), dtype=torch.bool)
    starts[1:] = (flat[1:] != flat[:-1]).any(-1)
    starts[::length] = True
    at = starts.nonzero().flatten()
    ends = [*at[1:].tolist(), rows * length]
    found = zip(at.tolist(), ends, flat[at].tolist(), strict=True)
    return [
        Run(start // length, start % length, start % length + end - start, tree, node, last)
        for start, end, (tree, node, last) in found
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
        return Block(row, start, stop, (), start, additive(seen, dtype))

    pending: tuple[int, int, int] | None = None
    for row, start, stop, runs in _trees(runs_of(segments)):
        # A window as long as the tree has no effect.
        cut = window is not None and stop - start > window
        chains = _chains(runs)
        alone = (len(chains) == 1 and not cut) or stop - start >= merge_below
        if pending and (alone or pending[0] != row or stop - pending[1] > merge_below):
            blocks.append(masked(*pending))
            pending = None
        if not alone:
            pending = (row, pending[1] if pending else start, stop)
        elif cut:
            blocks.append(masked(row, start, stop))
        else:
            blocks += [block for above, chain in chains for block in _ranges(above, chain, dtype)]
    if pending:
        blocks.append(masked(*pending))
    return tuple(blocks)


def _trees(runs: Sequence[Run]) -> Iterator[tuple[int, int, int, list[Run]]]:
    """Yield (row, start, stop, runs) of each tree."""
    for (row, _), members in groupby(runs, key=lambda run: (run.row, run.tree)):
        tree = list(members)
        seen: set[int] = set()
        for run in tree:
            if run.node in seen or (run.node == 0 and seen):
                raise ValueError(
                    "a tree must be its prefix (node 0), then each other node once, in one piece"
                )
            seen.add(run.node)
        yield row, tree[0].start, tree[-1].stop, tree


def _chains(runs: list[Run]) -> list[tuple[tuple[Span, ...], tuple[Run, int]]]:
    """Split a tree into chains: runs that follow each other, each one seen by all after it.

    Returns:
        For each chain the ranges that its tokens see before it, its first run and where it ends.
    """
    chains: list[tuple[tuple[Span, ...], tuple[Run, int]]] = []
    path: list[Run] = []
    for run in runs:
        while path and not path[-1].above(run):
            path.pop()
        if chains and path and path[-1].stop == run.start:
            above, (first, _) = chains[-1]
            chains[-1] = above, (first, run.stop)
        else:
            chains.append((_merged(path), (run, run.stop)))
        path.append(run)
    return chains


def _merged(runs: list[Run]) -> tuple[Span, ...]:
    """Return the ranges of tokens of some runs in order; runs that touch are one range."""
    spans: list[Span] = []
    for run in runs:
        if spans and spans[-1][1] == run.start:
            spans[-1] = spans[-1][0], run.stop
        else:
            spans.append((run.start, run.stop))
    return tuple(spans)


def _ranges(above: tuple[Span, ...], chain: tuple[Run, int], dtype: torch.dtype) -> list[Block]:
    """Split the queries of a chain into ranges of about equal length.

    They see each other causally, and all of `above`.
    """
    run, stop = chain
    own, seen = run.start, sum(end - start for start, end in above)
    count = max(1, round((stop - own) / max(QUERIES, 8 * torch.get_num_threads())))
    edges = [own + (stop - own) * at // count for at in range(count + 1)]
    blocks = []
    # Masks of equally many queries are views of the widest: apart, those of a long row would take
    # as much memory as the scores of all its tokens.
    widest: dict[int, Tensor] = {}
    for start, end in zip(edges, edges[1:], strict=False):
        size, mask = end - start, None
        if seen or start > own:
            if size not in widest:
                widest[size] = _causal(size, seen + stop - own, dtype)
            mask = widest[size][:, stop - end :]
        blocks.append(Block(run.row, start, end, above, own, mask))
    return blocks


def _causal(queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """Return the mask (queries, keys) of queries that are the last of the keys."""
    mask = torch.zeros(queries, keys, dtype=dtype)
    own = torch.full((queries, queries), float("-inf"), dtype=dtype).triu_(1)
    mask[:, keys - queries :] = own
    return mask


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
    blocks = (Block(0, 0, 8, (), 0, None),)

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
            block.queries(grads[0]).copy_(parts[0])
            for total, part in zip(grads[1:], parts[1:], strict=True):
                block.add_keys(total, part)
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
