"""A response to another prompt for every row, on which KTO estimates the KL divergence.

The mismatched response of a row is that of the row before it in its step of the first epoch, the
first one following the last, so that a step's mismatched responses are its own responses. Rows with
the same prompt are left out in between. It stays the same in later epochs: a reference store then
holds one mismatched response for each row, however long the run is. The rule depends on the seed,
the batch size and the rows alone, not on processes, micro-batches or the step of a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.batch.order import Order
from modern_llm.data.batch.prefix_tree import Examples, Ids
from modern_llm.data.table.token_table import TokenTable

Indices = NDArray[np.int64]
MISMATCHED = "mismatched"


class MismatchedTable:
    """A table of prompts and responses with a third column, a response to another prompt.

    Args:
        table: columns `prompt` and `response`.
        others: (rows,) the row whose response is the mismatched one.
        max_length: most tokens of prompt and response; the mismatched response is cut to it.
    """

    columns = ("prompt", "response", MISMATCHED)
    layouts = (("response",), (MISMATCHED,))
    """Responses that a forward of training computes together."""
    levels = None
    """Rows are no rankings."""

    def __init__(self, table: TokenTable, others: Indices, max_length: int):
        self._table, self.others = table, others
        self._room = max_length - table.lengths[:, table.columns.index("prompt")]

    def __len__(self) -> int:
        return len(self._table)

    def ids(self, index: int, column: str) -> Ids:
        """Return the int32 ids of one cell."""
        if column != MISMATCHED:
            return self._table.ids(index, column)
        return self._table.ids(int(self.others[index]), "response")[: self._room[index]]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows, 3) int64: ids in each cell."""
        found = self._table.lengths
        response = found[self.others, self._table.columns.index("response")]
        return np.concatenate([found, np.minimum(response, self._room)[:, None]], axis=1)

    @property
    def masked(self) -> bool:
        """Whether some responses have gaps."""
        return self._table.masked

    def gaps(self, index: int, column: str) -> Ids:
        """Return the gaps (n, 2) of one cell."""
        if column != MISMATCHED:
            return self._table.gaps(index, column)
        found = np.minimum(self._table.gaps(int(self.others[index]), "response"), self._room[index])
        return found[found[:, 0] < found[:, 1]]

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """(rows, 3) int64: ids in each cell without its gaps."""
        skipped = [np.diff(self.gaps(row, MISMATCHED)).sum() for row in range(len(self))]
        mismatched = self.lengths[:, 2] - np.array(skipped, np.int64)
        return np.concatenate([self._table.trained, mismatched[:, None]], axis=1)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(rows,) int64: ids of the row itself, by which the mismatched response was chosen."""
        return self._table.sizes

    def stored_row(self, index: int) -> int:
        """Return the place of a row in the files."""
        return self._table.stored_row(index)

    def values(self, name: str) -> NDArray[np.float64] | None:
        """Return a number of every row (rows,); None where rows have none."""
        return self._table.values(name)

    def origin(self, index: int) -> str:
        """Return where the row came from: `file:line`."""
        return self._table.origin(index)

    @property
    def folder(self) -> Path:
        """Folder of the files."""
        return self._table.folder


def with_mismatched(
    table: TokenTable,
    batch_size: int,
    max_length: int,
    order: Order | None = None,
) -> MismatchedTable:
    """Return the table with the mismatched response of every row.

    Args:
        order: of the training rows; None for rows that are read as they are (evaluation). Rows
            that were appended during a run are paired among themselves, in the order of the table.
    """
    if order is None:
        spans = [np.arange(len(table))]
    else:
        first = [order.step(step) for step in range(order.steps_per_epoch)]
        ends = [order.examples, *(rows for _, rows in order.grown)]
        spans = [
            np.concatenate(first),
            *(np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)),
        ]
    prompts = Examples(table, trees=False).prompt_numbers()
    return MismatchedTable(table, rows_of_others(spans, batch_size, prompts), max_length)


def rows_of_others(spans: Sequence[Indices], batch_size: int, prompts: Indices) -> Indices:
    """Return for each row another one with another prompt, by the rule above.

    A row whose step has no other prompt gets the nearest earlier one of its span or of the spans
    before it; the row itself where all prompts are equal.

    Args:
        spans: groups of row numbers, each row once, in the order in which they are read.
        batch_size: rows of one step.
        prompts: (rows,) a number of each row's prompt.
    """
    found = np.arange(len(prompts))
    before = np.zeros(0, np.int64)
    for span in spans:
        for start in range(0, len(span), batch_size):
            step = span[start : start + batch_size]
            found[step] = step[_previous_other(prompts[step])]
        before = np.concatenate([before, span])
        alone = prompts[found[span]] == prompts[span]
        if alone.any():
            place = np.empty_like(found)
            place[before] = np.arange(len(before))
            nearest = before[_previous_other(prompts[before])]
            found[span[alone]] = nearest[place[span[alone]]]
    return found


def _previous_other(numbers: Indices) -> Indices:
    """Return for each place in a circle the nearest one before it with another number; the place
    itself where all are equal."""
    places = np.arange(len(numbers))
    begins = numbers != np.roll(numbers, 1)
    if not begins.any():
        return places
    starts = np.maximum.accumulate(np.where(begins, places, -1))
    starts[starts < 0] = places[begins][-1]
    return (starts - 1) % len(numbers)
