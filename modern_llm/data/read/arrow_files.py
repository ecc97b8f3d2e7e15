"""Rows of Parquet and Arrow files, with columns that are read when a format asks for them.

A column that no format asks for is never decoded. The memory of a batch is bounded by bytes, not
by rows: a Parquet file of 300 bytes can stand for gigabytes of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from modern_llm.config.errors import DataError
from modern_llm.config.printable import first_line
from modern_llm.data.read.readers import MAX_ROW_BYTES, Row, Rows
from modern_llm.data.read.records import Unreadable

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_BATCH_ROWS, _BATCH_BYTES = 256, 2**26
# Text compresses three- to tenfold. What grows more than this is made to fill a memory.
_MOST_GROWTH, _FREE_BYTES = 1000, 2**28
# Bytes of a decoded number; of a text at least its place.
_WIDTHS = {"BOOLEAN": 1, "INT64": 8, "DOUBLE": 8}


class _Cells(Protocol):
    """A column, or a part of one; gives the array that holds a row, and the row's place in it."""

    def at(self, row: int) -> tuple[Any, int]: ...


class ArrowValues(Mapping[str, Any]):
    """Values of one row, each converted when it is read."""

    __slots__ = ("_cells", "_row")

    def __init__(self, cells: Mapping[str, _Cells], row: int):
        self._cells, self._row = cells, row

    def __getitem__(self, name: str) -> Any:
        array, at = self._cells[name].at(self._row)
        # Counted only where the whole batch is large: a slice costs more than the conversion.
        if array.nbytes > MAX_ROW_BYTES and array.slice(at, 1).nbytes > MAX_ROW_BYTES:
            return Unreadable(f"longer than {MAX_ROW_BYTES} bytes")
        try:
            return array[at].as_py(maps_as_pydicts="strict")
        except (ValueError, KeyError, OverflowError, ImportError, NotImplementedError) as error:
            return Unreadable(f"a {array.type} that cannot be converted ({first_line(error)})")

    def is_null(self, name: str) -> bool:
        """Whether a column has no value in this row."""
        array, at = self._cells[name].at(self._row)
        return not array[at].is_valid

    def __contains__(self, name: object) -> bool:
        return name in self._cells

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


class _Held:
    """A column that is in memory, or mapped."""

    def __init__(self, array: Any):
        self._array = array

    def at(self, row: int) -> tuple[Any, int]:
        return self._array, row


def rows_of(table: pyarrow.Table | pyarrow.RecordBatch) -> Iterator[ArrowValues]:
    """Yield the rows of a table."""
    cells = {name: _Held(table.column(at)) for at, name in enumerate(table.schema.names)}
    return (ArrowValues(cells, row) for row in range(table.num_rows))


def read_arrow(path: Path) -> Rows:
    """Yield the rows of an Arrow file, as `Dataset.save_to_disk` writes them; counted from 0."""
    import pyarrow
    import pyarrow.ipc

    index = 0
    try:
        with pyarrow.OSFile(str(path)) as file:
            whole = file.read(6) == b"ARROW1"
            file.seek(0)
            if whole:
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(file))
            for batch in batches:
                for values in rows_of(batch):
                    yield Row(values, f"{path}:[{index}]")
                    index += 1
    except pyarrow.ArrowException as error:
        raise _corrupt(f"{path}:[{index}]", "Arrow", error) from error


def read_parquet(path: Path) -> Rows:
    """Yield the rows of a Parquet file, a batch in memory at a time; rows are counted from 0."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Closed with the last row that is held: its other columns may still be asked for.
        file = pyarrow.parquet.ParquetFile(path, buffer_size=2**20)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _corrupt(str(path), "Parquet", error) from error
    if len(set(names)) != len(names):
        raise DataError(f"{path}: two columns of one name in {names}")
    growth = _Growth(path)
    growth.check_rows(file.metadata.num_rows)
    index = 0
    for group in range(file.num_row_groups):
        cells = {name: _Column(file, growth, group, name, index) for name in names}
        for row in range(file.metadata.row_group(group).num_rows):
            yield Row(ArrowValues(cells, row), f"{path}:[{index}]")
            index += 1


class _Growth:
    """Bytes that a file has unpacked to, against its size."""

    def __init__(self, path: Path):
        self.path = path
        self._most = max(_FREE_BYTES, _MOST_GROWTH * path.stat().st_size)
        self._bytes = 0

    def check_rows(self, rows: int) -> None:
        """Refuse more rows than a file of this size can hold."""
        if rows > self._most:
            raise DataError(f"{self.path}: corrupt Parquet: {rows} rows in so small a file")

    def add(self, size: int, place: str, *, declared: bool = False) -> None:
        """Refuse a file that grows without bound, by what it declares or by what was read."""
        self._bytes += 0 if declared else size
        if self._bytes + (size if declared else 0) > self._most:
            raise DataError(
                f"{place}: unpacks to more than {_MOST_GROWTH} times the size of the file: such a "
                "file is made to fill a memory"
            )


class _Column:
    """One column of a row group, read in order as its rows are asked for."""

    def __init__(
        self, file: pyarrow.parquet.ParquetFile, growth: _Growth, group: int, name: str, first: int
    ):
        self._file, self._growth, self._group = file, growth, group
        self._name, self._first = name, first
        self._batches: Iterator[pyarrow.RecordBatch] | None = None
        self._array: Any = None
        self._start = self._stop = 0

    def at(self, row: int) -> tuple[Any, int]:
        import pyarrow

        place = f"{self._growth.path}:[{self._first + row}], column {self._name!r}"
        try:
            if self._batches is None or row < self._start:
                self._batches = self._from_the_start(place)
                self._start = self._stop = 0
            while row >= self._stop:
                batch = next(self._batches, None)
                if batch is None:
                    raise DataError(f"{place}: corrupt Parquet: there is no such row")
                self._start, self._stop = self._stop, self._stop + batch.num_rows
                self._array = batch.column(batch.schema.names.index(self._name))
                self._growth.add(self._array.nbytes, place)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise _corrupt(place, "Parquet", error) from error
        return self._array, row - self._start

    def _from_the_start(self, place: str) -> Iterator[pyarrow.RecordBatch]:
        group = self._file.metadata.row_group(self._group)
        parts = [
            part
            for part in (group.column(at) for at in range(group.num_columns))
            if f"{part.path_in_schema}.".startswith(f"{self._name}.")
        ]
        size = sum(part.total_uncompressed_size for part in parts)
        # A list in one row is decoded at once, and equal numbers take no room in the file.
        inside = (
            part.num_values * _WIDTHS.get(part.physical_type, 4)
            for part in parts
            if part.num_values > group.num_rows
        )
        self._growth.add(max(size, sum(inside)), place, declared=True)
        # A value is at most as long as its column, but a dictionary may repeat it for every row.
        rows = min(max(_BATCH_BYTES // max(size, 1), 1), _BATCH_ROWS)
        repeated = [
            part.path_in_schema
            for part in parts
            if part.has_dictionary_page
            and part.num_values > group.num_rows
            and part.num_values * part.total_uncompressed_size > _FREE_BYTES
        ]
        if repeated:
            self._check_texts_in_lists(repeated, place)
        return self._file.iter_batches(
            batch_size=rows, row_groups=[self._group], columns=[self._name], use_threads=False
        )

    def _check_texts_in_lists(self, leaves: list[str], place: str) -> None:
        """Refuse lists that repeat texts so often that they would fill the memory.

        The row group is read with each text once, and a number where it is used: 4 bytes a use.

        Args:
            leaves: columns of text in lists, as paths in the file.
        """
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(self._growth.path, read_dictionary=leaves) as file:
            table = file.read_row_group(self._group, columns=[self._name], use_threads=False)
        chunks = (chunk for column in table.columns for chunk in column.chunks)
        self._growth.add(sum(map(_text_bytes, chunks)), place, declared=True)


def _text_bytes(array: pyarrow.Array) -> int:
    """Return the bytes that the texts in an array take once they are copied from a dictionary."""
    import pyarrow.compute
    from pyarrow import types

    kind = array.type
    if types.is_dictionary(kind):
        lengths = pyarrow.compute.binary_length(array.dictionary).take(array.indices)
        return pyarrow.compute.sum(lengths).as_py() or 0
    if types.is_map(kind):
        return _text_bytes(array.keys) + _text_bytes(array.items)
    if types.is_struct(kind):
        return sum(map(_text_bytes, array.flatten()))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _text_bytes(array.flatten())
    return 0


def _corrupt(place: str, kind: str, error: Exception) -> DataError:
    return DataError(f"{place}: corrupt {kind}: {first_line(error)}")
