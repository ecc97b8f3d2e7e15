"""Exchange around the attention of rows that are split over processes (Ulysses, arXiv 2309.14509).

Each process of a group has the same part of every row. Only attention reads other tokens: queries,
keys and values are exchanged, so that each process has all tokens of its share of the heads, and
the result is exchanged back. `distributed.sequence_group` has the collectives.

Letters: N processes of a group, R rows, L tokens of a row, l = L / N, H heads, E head width.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class SequenceGroup(Protocol):
    """The processes that share the rows of a micro-batch."""

    rank: int
    """Which part of every row this process has."""
    size: int
    """N."""

    def exchange(self, parts: Tensor) -> Tensor:
        """Send `parts[i]` of (N, ...) to process i; return what all sent here, in rank order. The
        gradient takes the way back."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over the group, without gradient."""


def joined(values: Tensor, at: Tensor, total: int, group: SequenceGroup) -> Tensor:
    """Return the values of all processes, on each of them.

    A gradient reaches the own values alone. All processes compute the same loss of the result, so
    their gradients add up to that of the whole.

    Args:
        values: (n, ...) of this process.
        at: (n,) their indices in the result (total, ...).
    """
    every = values.new_zeros(total, *values.shape[1:], requires_grad=False)
    every = group.sum(every.index_copy(0, at, values.detach()))
    return every.index_copy(0, at, values)


def exchanged(tensor: Tensor, group: SequenceGroup) -> Tensor:
    """Turn (R, A, b, E) into (R, A / N, N b, E): a share of A, with the b of all processes.

    Queries, keys and values (R, H, l, E) become (R, H / N, L, E), a part of the heads; the result
    (R, L, H / N, E) becomes (R, l, H, E), a part of the tokens.
    """
    sent = tensor.unflatten(1, (group.size, -1)).transpose(0, 1)
    found = group.exchange(_copied(sent))
    return _copied(found.permute(1, 2, 0, 3, 4)).flatten(2, 3)


def repeats(key_heads: int, size: int) -> int:
    """Return how often key heads are repeated so that the processes get equally many."""
    return size // math.gcd(key_heads, size)


def _copied(tensor: Tensor) -> Tensor:
    # A copy in any case: it also waits for the collective, whose result kernels cannot read.
    return tensor.clone(memory_format=torch.contiguous_format)
