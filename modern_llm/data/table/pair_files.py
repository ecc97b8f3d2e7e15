"""Pairs of token ids with log-probs as a Parquet or JSON-lines file, in the columns of TRL 1.16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.table.token_table import TokenTable
from modern_llm.storage.atomic import new_file
from modern_llm.storage.fault_points import around

SUFFIXES = (".parquet", ".jsonl")
_CHUNK = 1000
_COLUMNS = ("prompt", "chosen", "rejected")


def write_pairs(
    path: Path, table: TokenTable, rows: NDArray[np.int64], sums: NDArray[np.float32]
) -> None:
    """Write the pairs at `rows` of a table with their sums (P, 2), by the suffix of `path`."""
    with around("exported.write"), new_file(path) as temporary:
        if path.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as file:
                for start in range(0, len(rows), _CHUNK):
                    columns = _columns(table, rows[start : start + _CHUNK], sums)
                    names = list(columns)
                    for row in zip(*columns.values(), strict=True):
                        entry = dict(zip(names, (value.tolist() for value in row), strict=True))
                        file.write(json.dumps(entry) + "\n")
            return
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        ids = pyarrow.list_(pyarrow.int32())
        types = {name: ids if name.endswith("_ids") else pyarrow.float32() for name in _names()}
        with ParquetWriter(temporary, pyarrow.schema(types)) as writer:
            for start in range(0, len(rows), _CHUNK):
                columns = _columns(table, rows[start : start + _CHUNK], sums)
                arrays = [pyarrow.array(columns[name], types[name]) for name in types]
                writer.write_table(pyarrow.table(arrays, names=list(types)))


def _names() -> Iterator[str]:
    yield from (f"{name}_ids" for name in _COLUMNS)
    yield from (f"ref_{name}_logps" for name in _COLUMNS[1:])


def _columns(
    table: TokenTable, rows: NDArray[np.int64], sums: NDArray[Any]
) -> dict[str, list[Any]]:
    """Return the columns of some pairs."""
    every: list[list[Any]] = [[table.ids(int(row), name) for row in rows] for name in _COLUMNS]
    every += [list(sums[rows, side]) for side in (0, 1)]
    return dict(zip(_names(), every, strict=True))
