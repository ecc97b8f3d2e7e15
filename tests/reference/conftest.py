"""Where the store tests that write thousands of small files put them."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def new_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Path]]:
    """Make empty folders, in memory where there is such a place; all are removed at the end."""
    memory = Path("/dev/shm")
    base = memory if os.access(memory, os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(dir=base, prefix="stores-") as folder:
        numbers = itertools.count()

        def make() -> Path:
            place = Path(folder, str(next(numbers)))
            place.mkdir()
            return place

        yield make


@pytest.fixture
def place(new_place: Callable[[], Path]) -> Path:
    """One such folder."""
    return new_place()
