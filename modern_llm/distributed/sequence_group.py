"""Groups of processes that share the rows of a micro-batch: `train.sequence_parallel`.

The ranks of a group follow each other, so that a machine's processes exchange among themselves.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from modern_llm.distributed.collectives import MEETING_H, kept_group
from modern_llm.distributed.health.heartbeat import waiting
from modern_llm.storage.fault_points import around


class SequenceGroup:
    """The group of this process; a `models.attention.sequence.SequenceGroup`."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def exchange(self, parts: Tensor) -> Tensor:
        """Send `parts[i]` of (N, ...) to process i; return what all sent here, in rank order."""
        with around("collective.exchange"), waiting():
            return all_to_all_single_autograd(parts, None, None, self._group)

    @torch.no_grad()
    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over the group, without gradient."""
        total = values.clone()
        with around("collective.logprobs"), waiting():
            dist.all_reduce(total, group=self._group)
        return total


def sequence_group(size: int) -> SequenceGroup | None:
    """Return this process's group of `size`, None for 1; the first call is a collective."""
    if size == 1:
        return None
    return SequenceGroup(kept_group(f"sequence of {size}", lambda: _own_of(size)))


def _own_of(size: int) -> dist.ProcessGroup:
    """Create the groups of all processes; return that of this one."""
    # While models are on the host they are measured there, also where the run has GPUs.
    backend = "gloo" if dist.get_backend() == "gloo" else "cpu:gloo,cuda:nccl"
    found = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, backend=backend, timeout=timedelta(hours=MEETING_H))
        found = group if dist.get_rank() in ranks else found
    assert found is not None
    return found
