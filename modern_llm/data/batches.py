"""From planned examples to the tensors of one forward: the only part of `data` that knows torch.

Called by the tasks and the reference pass; it does not move anything to a device by itself.

Letters: R rows, L tokens of a row, N target tokens, P examples, S slots of an example (2 for a
pair).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modern_llm.data.plan import Rows
from modern_llm.data.rows import Examples, Sequence


@dataclass(frozen=True)
class MicroBatch:
    """What one forward on one process computes."""

    ids: Tensor
    """(R, L) int64."""
    positions: Tensor
    """(R, L) int64; restart at each branch and tree."""
    segments: Tensor
    """(R, L, 2) int64, [tree, branch]; tree -1 is padding."""
    targets: Tensor
    """(2, N) int64: flat index of the state that predicts, token id."""
    slots: Tensor
    """(N,) int64 in [0, P * S): which sum the log-prob of a target belongs to."""
    lengths: Tensor
    """(P, S) int64: number of targets of each slot."""
    examples: NDArray[np.int64]
    """(P,) indices into the token table; stays on the host."""
    real_tokens: int
    """Tokens that are not padding."""
    reference: Tensor | None = None
    """(P, S) float32 log-prob sums of the reference policy, where the objective needs them."""
    slope: Tensor | None = None
    """(P, S) derivative of the step's summed loss with respect to these sums, for a loss that looks
    across pairs and was therefore taken over the whole step first."""
    step_loss: Tensor | None = None
    """() this micro-batch's share of that summed loss."""

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same with every tensor on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def sums(self, logprobs: Tensor) -> Tensor:
        """Add the log-probs (N,) of the targets up to (P, S), in their dtype.

        Accumulated in float64 where the device has it: one after the other, some hundred float32
        numbers lose a digit that the difference to the reference needs.
        """
        wide = torch.float32 if logprobs.device.type == "mps" else torch.float64
        flat = logprobs.new_zeros(self.lengths.numel(), dtype=wide)
        sums = flat.index_add(0, self.slots, logprobs.to(wide))
        return sums.view(self.lengths.shape).to(logprobs.dtype)


def collate(examples: Examples, indices: NDArray[np.int64], *, shared: bool) -> MicroBatch:
    """Build the tensors of the given examples.

    Rows are as wide as the longest sequence; shorter ones share rows where `shared` allows it.
    Without
    examples the result is one real token without a target: a forward that takes part in every
    collective and adds nothing.
    """
    sequences = [(p, s) for p, i in enumerate(indices) for s in examples.sequences(int(i))]
    if not sequences:
        return _nothing(examples.slots)
    sequences.sort(key=lambda item: -len(item[1].ids))
    rows = Rows(len(sequences[0][1].ids), shared=shared)
    places = [rows.add(len(sequence.ids)) for _, sequence in sequences]
    shape = (len(rows.free), rows.width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments = np.full((*shape, 2), -1, np.int64)
    for tree, ((_, sequence), (row, at)) in enumerate(zip(sequences, places, strict=True)):
        here = slice(at, at + len(sequence.ids))
        ids[row, here] = sequence.ids
        positions[row, here] = sequence.positions
        segments[row, here, 0] = tree
        segments[row, here, 1] = sequence.branches
    sources, labels, slots = _targets(sequences, places, rows.width, examples.slots)
    lengths = np.bincount(slots, minlength=len(indices) * examples.slots)
    return MicroBatch(
        ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        targets=torch.from_numpy(np.stack([sources, labels])),
        slots=torch.from_numpy(slots),
        lengths=torch.from_numpy(lengths.reshape(len(indices), examples.slots)),
        examples=np.asarray(indices, dtype=np.int64),
        real_tokens=sum(len(sequence.ids) for _, sequence in sequences),
    )


def _targets(
    sequences: list[tuple[int, Sequence]],
    places: list[tuple[int, int]],
    width: int,
    per_example: int,
) -> tuple[NDArray[np.int64], ...]:
    """Flat source index, label and global slot of every target of a micro-batch, in row order."""
    parts = [
        (s.sources + (row * width + at), s.labels, s.slots + p * per_example)
        for (p, s), (row, at) in zip(sequences, places, strict=True)
    ]
    return tuple(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))


def _nothing(slots: int) -> MicroBatch:
    one = torch.zeros(1, 1, dtype=torch.long)
    return MicroBatch(
        ids=one,
        positions=one.clone(),
        segments=torch.zeros(1, 1, 2, dtype=torch.long),
        targets=torch.zeros(2, 0, dtype=torch.long),
        slots=torch.zeros(0, dtype=torch.long),
        lengths=torch.zeros(0, slots, dtype=torch.long),
        examples=np.zeros(0, dtype=np.int64),
        real_tokens=0,
    )
