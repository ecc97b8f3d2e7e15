"""Collation of planned examples into the tensors of one forward, on the CPU.

The only part of `data` that imports torch.

Letters: R rows, L tokens of a row, N target tokens, P examples, S slots of an example (2 for a
pair), M uses of target tokens: more than N where examples share an answer, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modern_llm.data.batch.order import FirstFitPacker, Sharing
from modern_llm.data.batch.prefix_tree import Examples, Laid, one_by_one
from modern_llm.data.batch.prefix_tree import Sequence as Tree


@dataclass(frozen=True)
class MicroBatch:
    """Tensors of one forward on one process."""

    ids: Tensor
    """(R, L) int64."""
    positions: Tensor
    """(R, L) int64; restart at each branch and tree."""
    segments: Tensor
    """(R, L, 2) int64, [tree, branch]; tree -1 is padding. (R, L, 3) where responses share more
    than the prompt: [tree, node, last node below it]."""
    targets: Tensor
    """(2, N) int64: flat index of the state that predicts, token id."""
    slots: Tensor
    """(M,) int64 in [0, P * S): which sum a use of a target's log-prob belongs to."""
    lengths: Tensor
    """(P, S) int64: number of targets of each slot."""
    examples: NDArray[np.int64]
    """(P,) indices into the token table; stays on the host."""
    real_tokens: int
    """Tokens that are not padding."""
    separate_tokens: int = 0
    """Tokens if each answer had a row with its own prompt."""
    flops: float = 0.0
    """Operations that the ideal algorithm needs for forward and backward; 0 where nobody counts."""
    used: Tensor | None = None
    """(M,) int64 in [0, N): the target of each use; None where each target is used once, in
    order."""
    reference: Tensor | None = None
    """(P, S) float32 log-prob sums of the reference policy, where the objective needs them."""
    weights: Tensor | None = None
    """(P,) float32 weights of the examples, where the data has them."""
    margins: Tensor | None = None
    """(P,) float32 margins of pairs, where the data has them."""
    levels: Tensor | None = None
    """(P, S) how the responses of a ranking rank: 0 is the best, equal ones tie, -1 is none."""
    mean_length: float | None = None
    """Mean number of targets of the chosen answers of the whole step, where the objective needs
    it."""
    slope: Tensor | None = None
    """(P, S) derivative of the step's summed loss with respect to these sums, for a loss that looks
    across pairs and was therefore taken over the whole step first."""
    step_terms: Mapping[str, Tensor] | None = None
    """Name -> () this micro-batch's share of that sum, by terms of the loss."""
    desirable: Tensor | None = None
    """(P,) bool labels of single responses."""
    mismatched: MicroBatch | None = None
    """The prompts of the same examples with responses to other prompts, where the objective
    estimates a KL divergence on them."""
    kl: Tensor | None = None
    """() that estimate, over the whole step."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> MicroBatch:
        """Return the same with every tensor in page-locked memory of the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        changed: dict[str, Tensor | MicroBatch] = {n: change(t) for n, t in tensors.items()}
        if self.mismatched is not None:
            changed["mismatched"] = self.mismatched._each(change)
        return replace(self, **changed)

    @property
    def area(self) -> int:
        """Tokens, padding included."""
        return self.ids.numel()

    def uses(self, logprobs: Tensor) -> Tensor:
        """Return the log-prob of every use (M,), in the order of `slots`, from those (N,) of the
        targets."""
        return logprobs if self.used is None else logprobs.index_select(0, self.used)

    def sums(self, logprobs: Tensor) -> Tensor:
        """Add the log-probs (N,) of the targets up to (P, S), in their dtype."""
        return self.add(self.uses(logprobs))

    def add(self, logprobs: Tensor) -> Tensor:
        """Add the log-probs (M,) of the uses up to (P, S), in their dtype.

        Accumulated in float64 where the device has it: one after the other, some hundred float32
        numbers lose a digit that the difference to the reference needs.
        """
        wide = wide_dtype(logprobs.device)
        flat = logprobs.new_zeros(self.lengths.numel(), dtype=wide)
        sums = flat.index_add(0, self.slots, logprobs.to(wide))
        return sums.view(self.lengths.shape).to(logprobs.dtype)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating type that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def collate(
    examples: Examples,
    indices: NDArray[np.int64] | Sequence[int],
    *,
    shared: Sharing,
    align: int = 1,
) -> MicroBatch:
    """Build the tensors of the given examples.

    Rows are as wide as the longest sequence, and shorter ones share rows where `shared` allows it;
    or all stand in one line. Without examples the result is one real token without a target: a
    forward that takes part in every collective and adds nothing.

    Args:
        examples: `Examples`, or anything with `slots` that gives the `sequences` of an index.
        align: the width of a line is rounded up to a multiple of it.
    """
    indices = np.asarray(indices, np.int64)
    ours = isinstance(examples, Examples)
    laid = examples.laid_out(indices) if ours else one_by_one(examples, indices)
    if not laid:
        return _nothing(examples.slots, align if shared == Sharing.LINE else 1)
    laid.sort(key=lambda item: -len(item.sequence.ids))
    real = sum(len(item.sequence.ids) for item in laid)
    width = len(laid[0].sequence.ids)
    if shared == Sharing.LINE:
        width = -(-real // align) * align
    rows = FirstFitPacker(width, shared=shared != Sharing.ALONE)
    places = [rows.add(len(item.sequence.ids)) for item in laid]
    shape = (len(rows.free), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    deep = any(item.sequence.lasts is not None for item in laid)
    segments = np.full((*shape, 3 if deep else 2), -1, np.int64)
    for tree, (item, (row, at)) in enumerate(zip(laid, places, strict=True)):
        here = slice(at, at + len(item.sequence.ids))
        ids[row, here] = item.sequence.ids
        positions[row, here] = item.sequence.positions
        segments[row, here, 0] = tree
        segments[row, here, 1] = item.sequence.branches
        if deep:
            segments[row, here, 2] = _lasts(item.sequence)
    sources, labels, slots, used = _targets(laid, places, width)
    lengths = np.bincount(slots, minlength=len(indices) * examples.slots)
    return MicroBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        targets=torch.from_numpy(np.stack([sources, labels])),
        slots=torch.from_numpy(slots),
        lengths=torch.from_numpy(lengths.reshape(len(indices), examples.slots)),
        examples=indices,
        real_tokens=real,
        separate_tokens=sum(examples.separate_tokens(int(i)) for i in indices) if ours else real,
        used=None if used is None else torch.from_numpy(used),
    )


def _lasts(sequence: Tree) -> NDArray[np.int64]:
    """Return (T,) the last node below each token's node."""
    if sequence.lasts is not None:
        return sequence.lasts
    return np.where(sequence.branches == 0, sequence.branches.max(initial=0), sequence.branches)


def _targets(
    laid: list[Laid], places: list[tuple[int, int]], width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]:
    """Return flat source index and label (N,) of the targets, slot and target (M,) of the uses."""
    sources, labels, slots, used = [], [], [], []
    before = 0
    for item, (row, at) in zip(laid, places, strict=True):
        sequence = item.sequence
        sources.append(sequence.sources + (row * width + at))
        labels.append(sequence.labels)
        targets = np.arange(before, before + len(sequence.labels))
        shared = max(map(len, item.uses), default=1) > 1
        if not shared:
            slots.append(np.array([uses[0] for uses in item.uses])[sequence.slots])
            used.append(targets)
        else:
            for branch, uses in enumerate(item.uses):
                mine = targets[sequence.slots == branch]
                slots += [np.full(len(mine), slot) for slot in uses]
                used += [mine] * len(uses)
        before += len(sequence.labels)
    each = np.concatenate(used).astype(np.int64)
    return (
        np.concatenate(sources).astype(np.int64),
        np.concatenate(labels).astype(np.int64),
        np.concatenate(slots).astype(np.int64),
        None if len(each) == before else each,
    )


def _nothing(slots: int, width: int = 1) -> MicroBatch:
    ids = torch.zeros(1, width, dtype=torch.long)
    segments = torch.full((1, width, 2), -1)
    segments[:, 0] = 0
    return MicroBatch(
        ids=ids,
        positions=ids.clone(),
        segments=segments,
        targets=torch.zeros(2, 0, dtype=torch.long),
        slots=torch.zeros(0, dtype=torch.long),
        lengths=torch.zeros(0, slots, dtype=torch.long),
        examples=np.zeros(0, dtype=np.int64),
        real_tokens=0,
    )
