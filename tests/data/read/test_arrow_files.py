"""Parquet and Arrow files: columns read on demand, memory bounded by bytes, damage named."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.read import arrow_files
from modern_llm.data.read.arrow_files import read_arrow, read_parquet
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import Unreadable
from modern_llm.data.read.values import Columns


def put(path: Path, table: pyarrow.Table, **options) -> Path:
    pyarrow.parquet.write_table(table, path, **options)
    return path


def test_parquet_rows_of_several_batches(tmp_path: Path):

    path = tmp_path / "rows.parquet"
    turns = [[{"role": "user", "content": f"q{i}"}] for i in range(2500)]
    names = [None if i == 7 else f"t{i}" for i in range(2500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": names, "messages": turns}), path)
    rows = list(read_parquet(path))
    assert len(rows) == 2500
    assert rows[0] == Row({"text": "t0", "messages": turns[0]}, f"{path}:[0]")
    assert rows[7].values["text"] is None and rows[2499].origin == f"{path}:[2499]"


def test_a_cut_parquet_file_is_refused(tmp_path: Path):

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="corrupt Parquet"):
        list(read_parquet(path))


def test_rows_can_be_read_again_and_out_of_order(tmp_path: Path):
    numbers = list(range(3000))
    path = put(tmp_path / "a.parquet", pyarrow.table({"n": numbers}), row_group_size=700)
    rows = list(read_parquet(path))
    assert [row.values["n"] for row in reversed(rows)] == numbers[::-1]
    assert [rows[at].values["n"] for at in (2999, 0, 1500, 1499)] == [2999, 0, 1500, 1499]


def test_an_unused_column_is_not_decoded(tmp_path: Path):
    """The pages of that column are garbage, which decoding would notice."""
    blob = [bytes(range(256)) * 40] * 50
    table = pyarrow.table({"text": [f"t{i}" for i in range(50)], "blob": blob})
    path = put(tmp_path / "a.parquet", table, compression="zstd", use_dictionary=False)
    part = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    raw = bytearray(path.read_bytes())
    start = part.data_page_offset
    raw[start : start + part.total_compressed_size] = b"\xff" * part.total_compressed_size
    path.write_bytes(raw)
    rows = list(read_parquet(path))
    assert [row.values["text"] for row in rows] == [f"t{i}" for i in range(50)]
    with pytest.raises(DataError, match=r"a\.parquet:\[0\], column 'blob': corrupt Parquet"):
        rows[0].values["blob"]


STRANGE = {
    "a time zone that is not known": pyarrow.array([0], pyarrow.timestamp("s", "Nowhere/City")),
    "nanoseconds": pyarrow.array([1], pyarrow.timestamp("ns")),
    "the year 300000": pyarrow.array([2**43], pyarrow.timestamp("s")),
    "bytes": pyarrow.array([b"\xff"]),
    "no UTF-8": pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers()),
    "a key twice": pyarrow.array([[("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), "int32")),
    "a field twice": pyarrow.StructArray.from_arrays(
        [pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"]
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_value_that_python_cannot_hold_affects_only_its_column(name: str):
    row = next(arrow_files.rows_of(pyarrow.table({"text": ["a"], "odd": STRANGE[name]})))
    values = Columns(row)
    assert values["text"] == "a" and "odd" in values
    odd = values["odd"]
    assert isinstance(odd, (Unreadable, str)), odd


def test_values_are_those_of_json(tmp_path: Path):
    day = datetime(2024, 2, 3, 4, 5, tzinfo=UTC)
    columns = {
        "large": pyarrow.array(["a"], pyarrow.large_string()),
        "view": pyarrow.array(["a"], pyarrow.string_view()),
        "coded": pyarrow.array(["a"]).dictionary_encode(),
        "binary": pyarrow.array([b"a"]),
        "fixed": pyarrow.array([["a", "b"]], pyarrow.list_(pyarrow.string(), 2)),
        "map": pyarrow.array([[("k", 1), ("n", None)]], pyarrow.map_(pyarrow.string(), "int32")),
        "day": pyarrow.array([day]),
        "whole": pyarrow.array([Decimal("2.00")]),
        "part": pyarrow.array([Decimal("2.50")]),
        "null": pyarrow.nulls(1),
    }
    expected = {
        "large": "a",
        "view": "a",
        "coded": "a",
        "binary": "a",
        "fixed": ["a", "b"],
        "map": {"k": 1},
        "day": "2024-02-03T04:05:00+00:00",
        "whole": 2,
        "part": 2.5,
        "null": None,
    }
    table = pyarrow.table(columns)
    values = Columns(next(arrow_files.rows_of(table)))
    assert dict(values) == expected and "null" not in values
    del columns["view"]  # Parquet has no such type
    (row,) = read_parquet(put(tmp_path / "a.parquet", pyarrow.table(columns)))
    assert dict(Columns(row.values)) == {k: v for k, v in expected.items() if k != "view"}


def test_a_dataset_on_disk_is_read_with_its_images_closed(tmp_path: Path):
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "image": [{"bytes": b"no image", "path": None}] * 2}, features
    )
    data.save_to_disk(str(tmp_path / "d"))
    path = tmp_path / "d" / "data-00000-of-00001.arrow"
    rows = list(read_arrow(path))
    assert [row.values["text"] for row in rows] == ["a", "b"]
    assert rows[1].origin == f"{path}:[1]"
    table = pyarrow.table({"text": ["c"]})
    with pyarrow.ipc.new_file(tmp_path / "f.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [row.values["text"] for row in read_arrow(tmp_path / "f.arrow")] == ["c"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow:\[0\]: corrupt Arrow"):
        list(read_arrow(path))


def bomb(path: Path, rows: int, size: int, nested: bool = False) -> Path:
    """A file of a few hundred bytes in which every row refers to one long text."""
    words = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["y" * size])
    )
    if nested:
        words = pyarrow.ListArray.from_arrays(
            pyarrow.array(range(rows + 1), pyarrow.int32()),
            pyarrow.StructArray.from_arrays([words], names=["content"]),
        )
    return put(
        path,
        pyarrow.table({"text": words}),
        compression="zstd",
        store_schema=False,
        dictionary_pagesize_limit=2**27,
    )


READ = """
import re, sys
import pyarrow
from modern_llm.data.read.arrow_files import read_parquet
from modern_llm.data.read.records import Unreadable
from pathlib import Path
list(read_parquet(Path(sys.argv[2])))  # loads the libraries
try:
    kinds = {type(row.values["text"]).__name__ for row in read_parquet(Path(sys.argv[1]))}
    print("read", *kinds)
except ValueError as error:
    print(error)
# Not ru_maxrss: a child inherits that of the process that started it.
status = Path("/proc/self/status")
peak = re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text()) if status.exists() else None
print(peak[1] if peak else 0)
"""


@pytest.mark.parametrize(
    ("size", "nested"), [(2**20, False), (2**20, True), (2**26, False)], ids=str
)
def test_a_file_that_unpacks_without_bound_is_refused_in_bounded_memory(size, nested, tmp_path):
    path = bomb(tmp_path / "bomb.parquet", 10_000, size, nested)
    small = put(tmp_path / "a.parquet", pyarrow.table({"text": ["a"]}))
    assert path.stat().st_size < 15_000
    found = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(small)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.splitlines()
    assert "unpacks to more than 1000 times the size of the file" in found[0], found
    assert f"{path}:[" in found[0]
    assert int(found[1]) < 1024 * 1024, f"{int(found[1]) / 1024:.0f} MiB"


def test_a_text_shared_by_many_rows_is_accepted(tmp_path: Path):
    """One prompt of 2 KB in 20,000 rows: a dictionary, as every writer makes it."""
    table = pyarrow.table({"text": ["p" * 2000] * 20_000, "n": list(range(20_000))})
    rows = read_parquet(put(tmp_path / "a.parquet", table))
    assert sum(len(row.values["text"]) for row in rows) == 2000 * 20_000


def test_a_value_beyond_the_bound_is_unreadable(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arrow_files, "MAX_ROW_BYTES", 1000)
    table = pyarrow.table({"text": ["a", "b" * 1001, "c" * 900]})
    rows = [row.values["text"] for row in read_parquet(put(tmp_path / "a.parquet", table))]
    assert rows == ["a", Unreadable("longer than 1000 bytes"), "c" * 900]


def test_more_rows_than_bytes_can_hold_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(arrow_files, "_FREE_BYTES", 1)
    monkeypatch.setattr(arrow_files, "_MOST_GROWTH", 1)
    path = put(tmp_path / "a.parquet", pyarrow.table({"n": pyarrow.nulls(100_000)}))
    with pytest.raises(DataError, match="100000 rows in so small a file"):
        list(read_parquet(path))


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    with pytest.raises(DataError, match="two columns of one name"):
        list(read_parquet(put(tmp_path / "a.parquet", table)))


def test_a_list_larger_than_its_file_could_hold_is_refused_undecoded(tmp_path):
    count = 100_000_000
    numbers = pyarrow.repeat(pyarrow.scalar(0, pyarrow.int32()), count)
    ends = pyarrow.array([0, count], pyarrow.int32())
    table = pyarrow.table({"text": pyarrow.ListArray.from_arrays(ends, numbers)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", data_page_size=2**30)
    del numbers, table
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    (row,) = read_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="unpacks to more than"):
        row.values["text"]
    assert pool.bytes_allocated() - before < 10_000_000


def test_a_list_that_repeats_a_long_text_is_refused_undecoded(tmp_path):
    """One text in the dictionary of the file, ten thousand times in one row."""
    text = "x" * 1_000_000
    for name, value in [("texts", text), ("messages", {"role": "user", "content": text})]:
        path = tmp_path / f"{name}.parquet"
        table = pyarrow.table({name: [[value] * 300, [value]]})
        pyarrow.parquet.write_table(table, path, dictionary_pagesize_limit=2**27)
        assert path.stat().st_size < 200_000
        row = next(iter(read_parquet(path)))
        with pytest.raises(DataError, match="unpacks to more than"):
            row.values[name]


def varint(number: int) -> bytes:
    """An integer as the footer of a Parquet file writes it."""
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


@pytest.mark.parametrize("lie", [2**31, 2**62])
def test_a_footer_that_lies_about_its_values_costs_no_memory(tmp_path: Path, lie: int):
    """Each of its counts of 100 in turn: rows of the file and the group, values of a column."""
    texts = [f"text {n}" for n in range(100)]
    whole = put(tmp_path / "a.parquet", pyarrow.table({"text": texts})).read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    body, footer = whole[: -8 - size], whole[-8 - size : -8]
    true, false = varint(200), varint(2 * lie)  # zigzag: twice the number
    places = [at for at in range(len(footer)) if footer[at : at + len(true)] == true]
    assert len(places) >= 3
    pool, refused = pyarrow.default_memory_pool(), 0
    for at in places:
        text = footer[:at] + false + footer[at + len(true) :]
        file = tmp_path / f"{at}.parquet"
        file.write_bytes(body + text + len(text).to_bytes(4, "little") + b"PAR1")
        before = pool.bytes_allocated()
        try:
            assert [row.values["text"] for row in read_parquet(file)] == texts
        except DataError:
            refused += 1
        assert pool.bytes_allocated() - before < 10_000_000
    assert refused >= 2


def test_lists_of_ordinary_texts_are_read(tmp_path):
    rows = [[{"role": "user", "content": f"{i} " * 2000}] * 3 for i in range(300)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), path)
    assert [row.values["messages"] for row in read_parquet(path)] == rows
