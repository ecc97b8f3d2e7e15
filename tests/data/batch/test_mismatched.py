"""The response to another prompt of every row: a rule of seed, batch size and rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from modern_llm.data.batch.mismatched import MISMATCHED, rows_of_others, with_mismatched
from modern_llm.data.batch.order import Order


def distinct(rows: int) -> np.ndarray:
    return np.arange(rows)


def test_a_step_is_paired_with_its_own_responses_shifted_by_one():
    order = np.array([4, 2, 0, 5, 1, 3, 6])
    found = rows_of_others([order], 3, distinct(7))
    # Steps (4 2 0), (5 1 3) and (6), which has no other row: the one before it in the epoch.
    assert {4: 0, 2: 4, 0: 2, 5: 3, 1: 5, 3: 1, 6: 3} == dict(enumerate(found.tolist()))


def test_rows_of_one_prompt_are_left_out_in_between():
    prompts = np.array([0, 0, 1, 2])
    assert rows_of_others([np.arange(4)], 4, prompts).tolist() == [3, 3, 1, 2]
    # A step of one prompt alone takes the nearest earlier row of the epoch with another.
    assert rows_of_others([np.arange(4)], 2, np.array([7, 7, 1, 1])).tolist() == [3, 3, 1, 1]
    assert rows_of_others([np.arange(3)], 2, np.zeros(3, int)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_no_row_gets_its_own_prompt_and_appended_rows_change_no_earlier_one(batch_size):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 6, 60)
    first = rng.permutation(40)
    before = rows_of_others([first], batch_size, prompts[:40])
    after = rows_of_others([first, np.arange(40, 60)], batch_size, prompts)
    assert (after[:40] == before).all()
    assert (prompts[after] != prompts).all()
    again = rows_of_others([first, np.arange(40, 51), np.arange(51, 60)], batch_size, prompts)
    assert (again[:40] == before).all() and (prompts[again] != prompts).all()


@dataclass
class Rows:
    """A table in memory."""

    prompts: list[list[int]]
    answers: list[list[int]]
    columns = ("prompt", "response")
    levels = None

    def __len__(self):
        return len(self.prompts)

    def ids(self, index, column):
        return np.array((self.prompts if column == "prompt" else self.answers)[index], np.int32)

    @property
    def lengths(self):
        return np.array([[len(p), len(a)] for p, a in zip(self.prompts, self.answers, strict=True)])

    def values(self, name):
        return None

    def origin(self, index):
        return f"rows:{index}"


def test_the_view_has_the_response_of_the_other_row_cut_to_the_length():
    table = Rows([[1, 2, 3], [4], [5, 6]], [[7], [8, 9, 10], [11, 12]])
    order = Order(3, 3, seed=1)
    view = with_mismatched(table, 3, 5, order)
    step = order.step(0).tolist()
    for at, row in enumerate(step):
        other = step[at - 1]
        assert view.others[row] == other
        whole = table.answers[other]
        room = 5 - len(table.prompts[row])
        assert view.ids(row, MISMATCHED).tolist() == whole[:room]
        assert view.ids(row, "response").tolist() == table.answers[row]
    cells = [[len(view.ids(row, name)) for name in view.columns] for row in range(3)]
    assert view.lengths.tolist() == cells
    assert len(view) == 3 and view.origin(2) == "rows:2"
