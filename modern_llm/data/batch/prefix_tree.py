"""Sequences from token ids: trees of responses that share a prefix, or one sequence per response.

A sequence is a unit that is never split across rows: one prefix plus its responses.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.batch.shared_starts import SHARED, shared_starts, tree_size
from modern_llm.data.table.gaps import none, trained_of
from modern_llm.data.table.token_table import STARTS, TokenTable

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Sequence:
    """One tree, laid out: T tokens, of which N are targets.

    Nodes of the tree are numbered in the order of the layout, the prefix is node 0. `sources[n]` is
    the offset of the state that predicts `labels[n]`: usually the token before, for the first token
    of a node the last one of the node above. `slots[n]` says which entry of `answers` counts it.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    branches: NDArray[np.int64]
    """(T,) number of each token's node."""
    lasts: NDArray[np.int64] | None
    """(T,) number of the last node below each token's node; None in a tree whose responses share
    the prefix alone."""
    sources: NDArray[np.int64]
    labels: NDArray[np.int64]
    slots: NDArray[np.int64]
    answers: List[tuple[int, ...]]
    """For each node after the prefix, the sums that its targets belong to."""


def lay_out(
    prefix: Ids, branches: List[Ids], slots: List[int], gaps: List[Ids] | None = None
) -> Sequence:
    """Return `[prefix | response | response ...]`; positions of each continue the prefix's.

    Responses that begin alike share these tokens too: `[prefix | start | rest | rest | response]`.
    Only tokens of responses are targets, without those in `gaps` (n, 2) of each. With an empty
    prefix the first token of a response has no token before it and is no target.

    Args:
        slots: the sum that each response belongs to.
    """
    nodes = shared_starts(branches, gaps)
    begin = len(prefix)
    cells = [branches[node.of[0]][node.start : node.start + node.size] for node in nodes]
    ids = np.concatenate([prefix, *cells]).astype(np.int64)
    starts = [begin + node.start for node in nodes]
    positions = np.concatenate(
        [
            np.arange(begin),
            *(np.arange(at, at + len(c)) for at, c in zip(starts, cells, strict=True)),
        ]
    )
    sizes = [begin, *(node.size for node in nodes)]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    lasts = None
    if any(node.below for node in nodes):
        below = [len(nodes), *(node.below for node in nodes)]
        lasts = np.repeat(np.arange(len(sizes)) + np.array(below), sizes)
    ends = np.cumsum(sizes)
    sources, targets, sums = [], [], []
    for number, node in enumerate(nodes):
        here = np.arange(ends[number], ends[number + 1])
        before = here - 1
        above = ends[node.parent]
        if node.size and above:
            before[0] = above - 1
        first = 0 if above else 1
        kept: Any = slice(first, None)  # a mask costs as much as all of the rest
        if gaps is not None and len(gaps[node.of[0]]):
            trained = trained_of(gaps[node.of[0]], len(branches[node.of[0]]))[node.start :]
            kept = first + np.flatnonzero(trained[first : node.size])
        sources.append(before[kept])
        targets.append(here[kept])
        sums.append(np.full(len(here[kept]), number))
    target = np.concatenate(targets)
    return Sequence(
        ids,
        positions,
        owners,
        lasts,
        np.concatenate(sources),
        ids[target],
        np.concatenate(sums),
        [tuple(slots[at] for at in node.of) for node in nodes],
    )


@dataclass(frozen=True)
class Laid:
    """A sequence of a micro-batch, and which sums its log-probs go to."""

    sequence: Sequence
    uses: list[list[int]]
    """For each node of the sequence, the slots of the micro-batch (example * S + slot) that use
    it: several if answers or examples share it."""


def one_by_one(examples: Examples, indices: NDArray[np.int64]) -> list[Laid]:
    """Return the sequences of each example by itself.

    Args:
        examples: anything that has `slots` and gives `sequences` of an index.
    """
    return [
        Laid(sequence, [[at * examples.slots + slot for slot in of] for of in sequence.answers])
        for at, index in enumerate(indices)
        for sequence in examples.sequences(int(index))
    ]


class Examples:
    """The examples of a token table as sequences.

    Args:
        table: a prompt with one or more responses (prompt, chosen, rejected), or documents (text,
            starts); an example has one sum of log-probs (slot) for each response.
        trees: whether responses to one prompt share it; else each is a sequence of its own.
        responses: columns of the responses to use; by default all after the prompt.
    """

    def __init__(self, table: TokenTable, *, trees: bool, responses: tuple[str, ...] | None = None):
        self.table, self.trees = table, trees
        self.documents = STARTS in table.columns
        every = ("text",) if self.documents else tuple(table.columns[1:])
        self.responses = responses or every
        self.slots = len(self.responses)
        self._column = {name: index for index, name in enumerate(table.columns)}
        self._masked = getattr(table, "masked", False)
        levels = None if self.documents else table.levels
        self._counts = None if levels is None else (levels >= 0).sum(1)

    def __len__(self) -> int:
        return len(self.table)

    def present(self, index: int) -> tuple[str, ...]:
        """Return the columns of an example's responses: a ranking may have fewer than another."""
        return self.responses if self._counts is None else self.responses[: self._counts[index]]

    @property
    def merges(self) -> bool:
        """Whether examples with equal prompts are computed as one tree."""
        return self.trees and self.slots > 1

    def together(self, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return `indices` in groups of equal prompts, in order of appearance."""
        if not self.merges or not len(indices):
            return [indices[at : at + 1] for at in range(len(indices))]
        groups: dict[bytes, list[int]] = {}
        for index in indices.tolist():
            groups.setdefault(self.table.ids(index, "prompt").tobytes(), []).append(index)
        return [np.array(group, dtype=np.int64) for group in groups.values()]

    def prompt_numbers(self) -> NDArray[np.int64]:
        """Return a number for each example: equal for equal prompts."""
        numbers: dict[bytes, int] = {}
        found = (self.table.ids(index, "prompt").tobytes() for index in range(len(self)))
        return np.array([numbers.setdefault(ids, len(numbers)) for ids in found], dtype=np.int64)

    def laid_out(self, indices: NDArray[np.int64]) -> list[Laid]:
        """Return the sequences of the given examples.

        Examples with one prompt stand in one tree, in which equal answers are one branch.
        """
        if not self.merges:
            return one_by_one(self, indices)
        at = {int(index): position for position, index in enumerate(indices)}
        result = []
        for group in self.together(np.asarray(indices)):
            branches: dict[tuple[bytes, bytes], tuple[Ids, Ids, list[int]]] = {}
            for index, slot, answer, gaps in self._answers(group):
                key = answer.tobytes(), gaps.tobytes()
                *_, uses = branches.setdefault(key, (answer, gaps, []))
                uses.append(at[index] * self.slots + slot)
            answers, gaps, uses = zip(*branches.values(), strict=True)
            prompt = self.table.ids(int(group[0]), "prompt")
            tree = lay_out(prompt, answers, range(len(answers)), gaps)
            result.append(
                Laid(tree, [[use for at in of for use in uses[at]] for of in tree.answers])
            )
        return result

    def _answers(self, group: NDArray[np.int64]) -> Iterator[tuple[int, int, Ids, Ids]]:
        for index in group.tolist():
            for slot, name in enumerate(self.present(index)):
                yield index, slot, self.table.ids(index, name), self._gaps(index, name)

    def _gaps(self, index: int, name: str) -> Ids:
        return self.table.gaps(index, name) if self._masked else none()

    def group_sizes(self, group: NDArray[np.int64]) -> tuple[int, ...]:
        """Return the tokens of each sequence of examples that are computed together."""
        if len(group) == 1:
            return self.sizes(int(group[0]))
        distinct = {
            (answer.tobytes(), gaps.tobytes()): (answer, gaps)
            for _, _, answer, gaps in self._answers(group)
        }
        prompt = int(self.table.lengths[int(group[0])][self._column["prompt"]])
        return (tree_size(prompt, *zip(*distinct.values(), strict=True)),)

    def separate_tokens(self, index: int) -> int:
        """Return the tokens of one example if each answer had a row with its own prompt."""
        if self.documents:
            return sum(self.sizes(index))
        lengths = self.table.lengths[index]
        answers = [int(lengths[self._column[name]]) for name in self.present(index)]
        return int(lengths[self._column["prompt"]]) * len(answers) + sum(answers)

    def sequences(self, index: int) -> list[Sequence]:
        """Return the sequences of one example; slots count from 0 within it."""
        if self.documents:
            return self._documents(index)
        prefix = self.table.ids(index, "prompt")
        answers = [self.table.ids(index, name) for name in self.present(index)]
        gaps = [self._gaps(index, name) for name in self.present(index)]
        if self.trees:
            return [lay_out(prefix, answers, range(len(answers)), gaps)]
        each = enumerate(zip(answers, gaps, strict=True))
        return [lay_out(prefix, [answer], [slot], [mine]) for slot, (answer, mine) in each]

    def _documents(self, index: int) -> list[Sequence]:
        text = self.table.ids(index, "text")
        empty = text[:0]
        starts = [0, *(int(s) for s in self.table.ids(index, "starts") if s > 0), len(text)]
        pieces = [text[a:b] for a, b in zip(starts, starts[1:], strict=False) if b > a]
        return [lay_out(empty, [piece], [0]) for piece in pieces]

    def sizes(self, index: int) -> tuple[int, ...]:
        """Return the number of tokens of each sequence of one example.

        Ids are read only where answers are long enough to share a start.
        """
        if self.documents:
            return tuple(len(sequence.ids) for sequence in self._documents(index))
        lengths = self.table.lengths[index]
        prompt = int(lengths[self._column["prompt"]])
        answers = [int(lengths[self._column[name]]) for name in self.present(index)]
        if not self.trees:
            return tuple(prompt + a for a in answers)
        if sum(answer >= SHARED for answer in answers) < 2:
            return (prompt + sum(answers),)
        _, _, ids, gaps = zip(*self._answers(np.array([index])), strict=True)
        return (tree_size(prompt, ids, gaps),)

    def targets(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n, slots) numbers of target tokens of the given examples."""
        if self.documents:
            counts = [sum(size - 1 for size in self.sizes(int(i))) for i in indices]
            return np.array(counts, dtype=np.int64).reshape(-1, 1)
        columns = [self._column[name] for name in self.responses]
        trained = self.table.trained if self._masked else self.table.lengths
        answers = np.asarray(trained)[indices][:, columns].astype(np.int64)
        # Without a prompt the first token of an answer has nothing before it.
        without = np.asarray(self.table.lengths)[indices][:, [self._column["prompt"]]] == 0
        return np.maximum(answers - without, 0)
