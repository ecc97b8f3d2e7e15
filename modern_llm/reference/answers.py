"""Distinct answers of a table, and their layout for the forwards of a model.

`Answers` are the distinct (prompt, response) of a table, such as one of pairs. `AnswerBatches` hold
some of them in trees, and the trees in groups: one group per forward.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.batch.collate import MicroBatch, collate
from modern_llm.data.batch.order import Budget, Sharing, pack
from modern_llm.data.batch.prefix_tree import Sequence as Laid
from modern_llm.data.batch.prefix_tree import lay_out
from modern_llm.data.batch.shared_starts import SHARED, tree_size
from modern_llm.data.table.gaps import none
from modern_llm.data.table.token_table import TokenTable
from modern_llm.reference.keys import KEY_BYTES, entry_keys, masked_key

MAX_RESPONSES = 8
"""Most responses to one prompt in one tree."""


class Answers:
    """Distinct answers of a table whose rows have a prompt and S responses to it.

    Attributes:
        sides: columns of the responses: chosen and rejected of a pair.
        keys: (E,) S16 names, each once, sorted.
        of_pairs: (P, S) index into `keys` of every row's answers; -1 where a ranking has fewer.
        targets: (E,) numbers of target tokens.
    """

    def __init__(self, table: TokenTable):
        self.table, self._masked = table, getattr(table, "masked", False)
        self.sides = tuple(table.columns[1:])
        width = len(self.sides)
        names: list[bytes] = []
        prompts: list[bytes] = []
        empty = np.zeros(0, np.int32)
        for row in range(len(table)):
            answers = [table.ids(row, side) for side in self.sides]
            *keys, prompt = entry_keys(table.ids(row, "prompt"), *answers, empty)
            for at, side in enumerate(self.sides if self._masked else ()):
                if len(gaps := table.gaps(row, side)):
                    keys[at] = masked_key(table.ids(row, "prompt"), answers[at], gaps)
            names += keys
            prompts.append(prompt)
        every = np.frombuffer(b"".join(names), f"S{KEY_BYTES}")
        levels = table.levels
        there = np.arange(len(every)) if levels is None else np.flatnonzero(levels >= 0)
        self.keys, first, inverse = np.unique(every[there], return_index=True, return_inverse=True)
        self._first = there[first]
        of_pairs = np.full(len(every), -1)
        of_pairs[there] = inverse.reshape(-1)
        self.of_pairs = of_pairs.reshape(-1, width)
        self._prompts = np.frombuffer(b"".join(prompts), f"S{KEY_BYTES}")[self._first // width]
        columns = [table.columns.index(name) for name in ("prompt", *self.sides)]
        lengths = np.asarray(table.lengths)[:, columns][self._first // width]
        self.prompt_lengths = lengths[:, 0]
        self.lengths = lengths[np.arange(len(lengths)), 1 + self._first % width]
        counts = np.asarray(table.trained if self._masked else table.lengths)[:, columns]
        trained = counts[self._first // width, 1 + self._first % width]
        # Without a prompt the first token of an answer is no target: nothing precedes it.
        self.targets = trained - (self.prompt_lengths == 0)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def per_row(self) -> int:
        """Answers of a row, of rankings the mean."""
        return max(1, round(float((self.of_pairs >= 0).sum(1).mean())))

    def in_rows(self, values: NDArray, absent: Any) -> NDArray:
        """Return a value of every answer (E,) as (P, S), `absent` where a ranking has fewer."""
        return np.where(self.of_pairs < 0, absent, values[self.of_pairs])

    def origin(self, entry: int) -> str:
        """Return file and line of the first row with this answer."""
        return self.table.origin(int(self._first[entry]) // len(self.sides))

    def earliest(self, entries: NDArray[np.int64]) -> int:
        """Return which of some answers comes first in the data."""
        return int(entries[self._first[entries].argmin()])

    def prompt(self, entry: int) -> NDArray[np.int32]:
        """Return the ids of an answer's prompt."""
        return self.table.ids(int(self._first[entry]) // len(self.sides), "prompt")

    def response(self, entry: int) -> NDArray[np.int32]:
        """Return the ids of an answer."""
        row, side = divmod(int(self._first[entry]), len(self.sides))
        return self.table.ids(row, self.sides[side])

    def gaps(self, entry: int) -> NDArray[np.int32]:
        """Return the stretches (n, 2) of an answer that are no targets."""
        row, side = divmod(int(self._first[entry]), len(self.sides))
        return self.table.gaps(row, self.sides[side]) if self._masked else none()

    def by_prompt(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `entries` (n,) with the answers of one prompt next to each other.

        These are in the order of the data, chosen before rejected, as training lays out a pair: in
        16 bits another order of keys in attention moves the sum of an answer by tenths of a nat.
        """
        return entries[np.lexsort((self._first[entries], self._prompts[entries]))]

    def same_prompt(self, one: int, other: int) -> bool:
        """Return whether two answers have the same prompt."""
        return bool(self._prompts[one] == self._prompts[other])


class AnswerBatches:
    """Some answers laid out in trees: one prompt with up to `MAX_RESPONSES` responses each.

    Args:
        entries: (n,) indices into `answers`.
        shared: what the rows of a batch may hold; if trees, responses share their prompt's forward.
        budget: tokens per forward, padding included.
        alone: whether each answer has a forward of its own.
    """

    slots = MAX_RESPONSES

    def __init__(
        self,
        answers: Answers,
        entries: NDArray[np.int64],
        *,
        shared: Sharing,
        budget: int,
        alone: bool = False,
    ):
        self.answers, self.budget, self._shared, self._alone = answers, budget, shared, alone
        self._items: list[list[int]] = []
        before, size = -1, 0
        for entry in answers.by_prompt(entries).tolist():
            length = int(answers.lengths[entry])
            item = self._items[-1] if self._items else []
            fits = (
                not alone
                and len(item) < MAX_RESPONSES
                and (len(item) < 2 or size + length <= budget)
            )
            if before >= 0 and fits and answers.same_prompt(before, entry):
                item.append(entry)
                size += length
            else:
                self._items.append([entry])
                size = int(answers.prompt_lengths[entry]) + length
            before = entry

    def entries(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the answers of some trees, in the order in which they are scored."""
        return np.array([e for item in group.tolist() for e in self._items[item]], np.int64)

    def groups(
        self, items: NDArray[np.int64] | None = None, budget: int | None = None
    ) -> list[NDArray[np.int64]]:
        """Return the trees (or some of them) in groups that fit the budget, longest first.

        They depend only on the answers and the budget. The number of processes changes no group,
        and therefore no value.
        """
        chosen = np.arange(len(self._items)) if items is None else items
        if self._alone:
            return [chosen[at : at + 1] for at in range(len(chosen))]
        limit = Budget(tokens=budget or self.budget)
        (groups,) = pack(chosen, self.sizes, world=1, budget=limit, shared=self._shared)
        return [group for group in groups if len(group)]

    def sequences(self, item: int) -> list[Laid]:
        """Return the sequences of one tree, for `collate`."""
        entries = self._items[item]
        prompt = self.answers.prompt(entries[0])
        responses = [self.answers.response(entry) for entry in entries]
        gaps = [self.answers.gaps(entry) for entry in entries]
        if self._shared != Sharing.ALONE:
            return [lay_out(prompt, responses, range(len(entries)), gaps)]
        each = enumerate(zip(responses, gaps, strict=True))
        return [lay_out(prompt, [response], [slot], [mine]) for slot, (response, mine) in each]

    def responses(self, item: int) -> int:
        """Return the number of responses of one tree."""
        return len(self._items[item])

    def sizes(self, item: int) -> tuple[int, ...]:
        """Return the number of tokens of each sequence of one tree."""
        entries = self._items[item]
        prompt = int(self.answers.prompt_lengths[entries[0]])
        lengths = [int(self.answers.lengths[entry]) for entry in entries]
        if self._shared == Sharing.ALONE:
            return tuple(prompt + n for n in lengths)
        if sum(length >= SHARED for length in lengths) < 2:
            return (prompt + sum(lengths),)
        responses = [self.answers.response(entry) for entry in entries]
        return (tree_size(prompt, responses, [self.answers.gaps(entry) for entry in entries]),)

    def collate(self, group: NDArray[np.int64]) -> MicroBatch:
        """Return the tensors of some trees; an empty group gives a dummy batch."""
        return collate(self, group, shared=self._shared)
