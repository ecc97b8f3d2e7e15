"""Stretches of a response that are not trained on: tool results and users between answers.

A gap is a start and an end, counted from the first id of its cell. Gaps of a cell are in order and
do not touch; a cell without any is trained on as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]


def none() -> Ids:
    """Return no gaps, (0, 2)."""
    return np.zeros((0, 2), np.int32)


class Cells(list[Ids]):
    """The ids of one row, a cell for each column, with the gaps of each cell."""

    gaps: Sequence[Ids] = ()
    """(n, 2) for each cell; empty where no cell has any."""


def gaps_of(trained: NDArray[np.bool_]) -> Ids:
    """Return the gaps (n, 2) of a mask of trained ids."""
    edges = np.diff(trained.astype(np.int8), prepend=1, append=1)
    return np.flatnonzero(edges).astype(np.int32).reshape(-1, 2)


def trained_of(gaps: Ids, size: int) -> NDArray[np.bool_]:
    """Return the mask (size,) of trained ids."""
    trained = np.ones(size, bool)
    for start, end in gaps:
        trained[start:end] = False
    return trained
