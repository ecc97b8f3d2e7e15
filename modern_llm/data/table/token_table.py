"""`TokenTable`: examples as token ids in memory-mapped files, with cells of any length.

A table is a folder of flat arrays that is written once, in order, and never changed:
`ids.bin` (int32), `bounds.bin` (int64, where each cell begins), `origins.bin` with
`origin_bounds.bin` and `origin_files.bin` (where each row came from), and `meta.json`, written
last; and, where rows have numbers, `values.bin` (float64). It knows nothing of text or of tensors.
Written by `prepare`, read by `rows` and the stages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import StorageError
from modern_llm.data.read.records import LEVELS
from modern_llm.data.table.content import FILES, GAPS, VALUES, Content, map_file
from modern_llm.data.table.gaps import none
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_text

Ids = NDArray[np.int32]

VERSION = 1
STARTS = "starts"
"""Column of positions within its row, which are not token ids."""
_CHUNK = 4096


class TokenTable:
    """Examples in a fixed order. Make one with `TokenTable.open`; `select` gives a part of it.

    Attributes:
        columns: names of the columns, such as ("prompt", "chosen", "rejected").
        masked: whether some responses have gaps.
        folder: where the files are.
    """

    def __init__(
        self,
        folder: Path,
        meta: dict[str, Any],
        arrays: dict[str, NDArray],
        rows: NDArray[np.int64] | None = None,
    ):
        self.folder = folder
        self.columns: tuple[str, ...] = tuple(meta["columns"])
        self._meta, self._arrays, self._rows = meta, arrays, rows
        self.masked = "gaps" in arrays
        self._column = {name: index for index, name in enumerate(self.columns)}

    @classmethod
    def open(cls, folder: Path) -> TokenTable:
        """Map the files of a table.

        Raises:
            StorageError: the folder holds no whole table of this version.
        """
        try:
            meta = json.loads(read_text(folder / "meta.json"))
            if meta["version"] != VERSION:
                raise ValueError(f"version {meta['version']}, not {VERSION}")
            names = [*FILES, *(name for name in VALUES | GAPS if name in meta["sizes"])]
            arrays = {name: map_file(folder, name, meta["sizes"][name]) for name in names}
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise StorageError(f"{folder}: no whole token table ({error}): remove it") from error
        return cls(folder, meta, arrays)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(rows,) int64: ids of all cells of each row."""
        return self.lengths.sum(axis=1)

    @property
    def layouts(self) -> tuple[tuple[str, ...], ...]:
        """Responses that a forward of training computes together: all of a row."""
        return (self.columns[1:],)

    def __len__(self) -> int:
        return self._meta["rows"] if self._rows is None else len(self._rows)

    def ids(self, index: int, column: str) -> Ids:
        """Return the int32 ids of one cell, a read-only view of the file."""
        cell = self._row(index) * len(self.columns) + self._column[column]
        start, end = self._arrays["bounds"][cell : cell + 2]
        return self._arrays["ids"][start:end]

    def gaps(self, index: int, column: str) -> Ids:
        """Return the gaps (n, 2) of one cell."""
        if not self.masked:
            return none()
        cell = self._row(index) * len(self.columns) + self._column[column]
        start, end = self._arrays["gap_bounds"][cell : cell + 2]
        return self._arrays["gaps"][start:end].reshape(-1, 2)

    def values(self, name: str) -> NDArray[np.float64] | None:
        """Return a number of every row (rows,), such as `weight`; None where rows have none."""
        names = self._meta.get("values", [])
        if name not in names:
            return None
        found = self._arrays["values"].reshape(-1, len(names))[:, names.index(name)]
        return found if self._rows is None else found[self._rows]

    @cached_property
    def levels(self) -> NDArray[np.float32] | None:
        """Return (rows, responses) how the responses of each row rank: 0 is the best, equal ones
        tie, -1 is none; None where rows are no rankings."""
        if self.values(LEVELS[0]) is None:
            return None
        return np.stack([self.values(name) for name in LEVELS], 1).astype(np.float32)

    def origin(self, index: int) -> str:
        """Return where the row came from: `file:line`."""
        row = self._row(index)
        start, end = self._arrays["origin_bounds"][row : row + 2]
        file = self._meta["files"][self._arrays["origin_files"][row]]
        return file + self._arrays["origins"][start:end].tobytes().decode()

    def stored_row(self, index: int) -> int:
        """Return the place of a row in the files, which a view of some rows leaves as they are."""
        return self._row(index)

    def _row(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a table of {len(self)} rows")
        index %= len(self)
        return index if self._rows is None else int(self._rows[index])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(rows, columns) int64: ids in each cell."""
        found = np.diff(self._arrays["bounds"]).reshape(-1, len(self.columns))
        return found if self._rows is None else found[self._rows]

    @cached_property
    def trained(self) -> NDArray[np.int64]:
        """(rows, columns) int64: ids in each cell without its gaps."""
        if not self.masked:
            return self.lengths
        gaps = self._arrays["gaps"].astype(np.int64)
        before = np.concatenate([[0], np.cumsum(gaps[1::2] - gaps[::2])])
        skipped = np.diff(before[self._arrays["gap_bounds"] // 2]).reshape(-1, len(self.columns))
        return self.lengths - (skipped if self._rows is None else skipped[self._rows])

    @cached_property
    def digest(self) -> str:
        """Digest of columns, lengths, ids, gaps and numbers of all rows in order: equal for equal
        content."""
        if self._rows is None:
            return self._meta["digest"]
        content = Content(self.columns, self._meta.get("values", []))
        for start in range(0, len(self), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(self)))
            cells = np.concatenate([self._cells(i) for i in rows])
            content.add(cells, self.lengths[rows], self._numbers(rows), self._gaps(rows))
        return content.hexdigest()

    def _numbers(self, rows: range) -> NDArray[np.float64]:
        """(n, values) numbers of some rows."""
        found = [self.values(name)[rows] for name in self._meta.get("values", [])]
        return np.stack(found, 1) if found else np.zeros((len(rows), 0))

    def _gaps(self, rows: range) -> list[Ids]:
        """The gaps of every cell of some rows; nothing where the table has none."""
        if not self.masked:
            return []
        return [self.gaps(row, name) for row in rows for name in self.columns]

    def _cells(self, index: int) -> Ids:
        """All ids of a row."""
        row, width = self._row(index), len(self.columns)
        start, end = self._arrays["bounds"][[row * width, (row + 1) * width]]
        return self._arrays["ids"][start:end]

    @cached_property
    def max_id(self) -> int:
        """The largest token id of all rows; -1 where there is none."""
        if self._rows is None:
            return self._meta["max_id"]
        columns = [name for name in self.columns if name != STARTS]
        cells = (self.ids(i, name) for i in range(len(self)) for name in columns)
        return max((int(ids.max()) for ids in cells if len(ids)), default=-1)

    def first_with_id(self, least: int) -> tuple[int, int] | None:
        """Return the first row with a token id of at least `least`, and its largest id."""
        if self.max_id < least:
            return None
        columns = [name for name in self.columns if name != STARTS]
        for row in range(len(self)):
            highest = max(int(self.ids(row, name).max(initial=-1)) for name in columns)
            if highest >= least:
                return row, highest
        return None

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TokenTable:
        """Return a view of the rows at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"rows {chosen.min()}..{chosen.max()} of a table of {len(self)} rows")
        rows = chosen if self._rows is None else self._rows[chosen]
        return TokenTable(self.folder, self._meta, self._arrays, rows)

    def first_difference(self, other: TokenTable) -> int | None:
        """Return the first row that is not the same in `other` (or there in one alone), if any."""
        alike = self._named() == other._named()
        shared = min(len(self), len(other)) if alike else 0
        for start in range(0, shared, _CHUNK):
            rows = range(start, min(start + _CHUNK, shared))
            if (
                not np.array_equal(self.lengths[rows], other.lengths[rows])
                or not np.array_equal(self._numbers(rows), other._numbers(rows))
                or not self._same_gaps(rows, other)
                or not np.array_equal(
                    np.concatenate([self._cells(i) for i in rows]),
                    np.concatenate([other._cells(i) for i in rows]),
                )
            ):
                return next(i for i in rows if not self._same(i, other))
        return None if shared == len(self) == len(other) else shared

    def _same(self, index: int, other: TokenTable) -> bool:
        row = range(index, index + 1)
        return (
            np.array_equal(self.lengths[index], other.lengths[index])
            and np.array_equal(self._numbers(row), other._numbers(row))
            and self._same_gaps(row, other)
            and np.array_equal(self._cells(index), other._cells(index))
        )

    def _same_gaps(self, rows: range, other: TokenTable) -> bool:
        if not self.masked and not other.masked:
            return True
        pairs = ((self.gaps(i, n), other.gaps(i, n)) for i in rows for n in self.columns)
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs)

    def _named(self) -> tuple[tuple[str, ...], list[str]]:
        return self.columns, self._meta.get("values", [])

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files again; pickling a map would send all of its bytes.
        return _reopen, (self.folder, self._rows)


def _reopen(folder: Path, rows: NDArray[np.int64] | None) -> TokenTable:
    table = TokenTable.open(folder)
    return table if rows is None else table.select(rows)


class TokenTableWriter:
    """Writes a table row by row; it is whole when the `with` block ends without error.

    Holds a few thousand rows in memory, however many are written.

    Args:
        folder: its folder, new or empty and inside one that is not named yet (`new_folder`).
        columns: their names.
        defaults: numbers that rows may have, with the value of a row without one. The table has
            them all if one row has one, else none.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], defaults: Mapping[str, float] | None = None
    ):
        self._folder, self.columns = folder, tuple(columns)
        self._defaults, self._has_numbers = dict(defaults or {}), False
        self._numbers: list[list[float]] = []
        self._file_types = FILES | (VALUES if self._defaults else {})
        self._gaps: list[Ids] = []
        self.rows = self.tokens = 0
        self._content = Content(self.columns, list(self._defaults))
        self._is_ids = [name != STARTS for name in self.columns]
        self._cells: list[Ids] = []
        self._tails: list[bytes] = []
        self._origin_files: list[int] = []
        self._files: dict[str, int] = {}
        self._sizes = dict.fromkeys(self._file_types, 0)
        self._ends = {"bounds": 0, "origin_bounds": 0}
        self._max_id = -1

    def __enter__(self) -> TokenTableWriter:
        with ExitStack() as stack:
            with around("table.make"):
                self._folder.mkdir(exist_ok=True)
                self._out = {
                    name: stack.enter_context((self._folder / f"{name}.bin").open("wb"))
                    for name in self._file_types
                }
            for name in self._ends:
                self._write(name, np.zeros(1))
            self._stack = stack.pop_all()
        return self

    def add(
        self, cells: Sequence[Ids], origin: str, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Append one row: the ids of each column, `file:line`, and its numbers."""
        assert len(cells) == len(self.columns), (len(cells), self.columns)
        # Of a million rows most come from a few files: only what follows the file is kept for each.
        file, mark, tail = origin.rpartition(":")
        self._origin_files.append(self._files.setdefault(file, len(self._files)))
        self._tails.append((mark + tail).encode())
        self._cells.extend(cells)
        self._gaps += getattr(cells, "gaps", ()) or [none()] * len(cells)
        if self._defaults:
            self._has_numbers |= bool(numbers)
            self._numbers.append(list({**self._defaults, **(numbers or {})}.values()))
        self.rows += 1
        self.tokens += sum(
            len(cell) for cell, is_ids in zip(cells, self._is_ids, strict=True) if is_ids
        )
        if len(self._tails) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self._tails:
            return
        ids = np.concatenate(self._cells).astype("<i4", copy=False)
        sizes = np.array([len(cell) for cell in self._cells]).reshape(-1, len(self.columns))
        tokens = ids[np.repeat(np.tile(self._is_ids, len(sizes)), sizes.reshape(-1))]
        self._max_id = max(self._max_id, int(tokens.max(initial=-1)))
        numbers = np.array(self._numbers, "<f8").reshape(len(sizes), -1)
        self._content.add(ids, sizes, numbers, self._gaps)
        self._write_gaps(sizes.size)
        if self._defaults:
            self._write("values", numbers.reshape(-1))
        self._write("ids", ids)
        self._write_bounds("bounds", sizes.reshape(-1))
        self._write("origins", np.frombuffer(b"".join(self._tails), "u1"))
        self._write_bounds("origin_bounds", np.array([len(tail) for tail in self._tails]))
        self._write("origin_files", np.array(self._origin_files))
        self._cells, self._tails, self._origin_files, self._numbers = [], [], [], []
        self._gaps = []

    def _write_gaps(self, cells: int) -> None:
        """Write the gaps of the cells written now; nothing before the first gap of the table."""
        if "gaps" not in self._out:
            if not any(map(len, self._gaps)):
                return
            for name in GAPS:
                with around("table.make"):
                    file = (self._folder / f"{name}.bin").open("wb")
                self._out[name] = self._stack.enter_context(file)
            self._file_types |= GAPS
            self._sizes |= dict.fromkeys(GAPS, 0)
            self._ends["gap_bounds"] = 0
            # Cells before have none: those of all rows but the ones of this batch.
            self._write("gap_bounds", np.zeros(1 + self.rows * len(self.columns) - cells))
        self._write("gaps", np.concatenate([gaps.reshape(-1) for gaps in self._gaps]))
        self._write_bounds("gap_bounds", np.array([gaps.size for gaps in self._gaps]))

    def _write_bounds(self, name: str, sizes: NDArray[np.int64]) -> None:
        ends = self._ends[name] + np.cumsum(sizes)
        self._ends[name] = int(ends[-1])
        self._write(name, ends)

    def _write(self, name: str, values: NDArray) -> None:
        with around("table.write"):
            self._out[name].write(np.ascontiguousarray(values, self._file_types[name]))
        self._sizes[name] += len(values)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                self._flush()
                self._finish()

    def _finish(self) -> None:
        for file in self._out.values():
            file.close()
        if self._has_numbers:
            values = {"values": list(self._defaults)}
        else:
            values, self._content.values = {}, []
            if self._sizes.pop("values", None) is not None:
                (self._folder / "values.bin").unlink()
        meta = {
            "version": VERSION,
            "columns": self.columns,
            "rows": self.rows,
            "max_id": self._max_id,
            "digest": self._content.hexdigest(),
            "files": list(self._files),
            "sizes": self._sizes,
            **values,
        }
        with around("table.meta"):
            (self._folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
