"""A table returns what was written, in parts and in other processes, and only if it is complete."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config.errors import StorageError
from modern_llm.data.table import token_table
from modern_llm.data.table.token_table import TokenTable, TokenTableWriter
from modern_llm.storage.atomic import new_folder

ROWS = [([1, 2], [3], [4, 5, 6]), ([], [7], [8, 9]), ([500], [10, 11], [12])]


def ids(values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def write(folder: Path, rows, columns=("prompt", "chosen", "rejected")) -> TokenTable:
    with new_folder(folder) as new, TokenTableWriter(new, columns) as writer:
        for number, row in enumerate(rows, 1):
            writer.add([ids(cell) for cell in row], f"dir/a:b.jsonl:{number}")
    return TokenTable.open(folder)


def test_cells_lengths_and_origins_come_back(tmp_path: Path):
    table = write(tmp_path / "t", ROWS)
    assert len(table) == 3 and table.columns == ("prompt", "chosen", "rejected")
    for i, row in enumerate(ROWS):
        assert tuple(table.ids(i, name).tolist() for name in table.columns) == row
        assert table.origin(i) == f"dir/a:b.jsonl:{i + 1}"
    assert table.lengths.tolist() == [[2, 1, 3], [0, 1, 2], [1, 2, 1]]
    assert table.lengths.dtype == np.int64 and table.ids(0, "prompt").dtype == np.int32
    assert table.max_id == 500
    assert table.ids(-1, "prompt").tolist() == [500]
    with pytest.raises(IndexError):
        table.ids(3, "prompt")
    with pytest.raises(ValueError, match="read-only"):
        table.ids(0, "prompt")[0] = 1


def test_a_selection_is_a_table(tmp_path: Path):
    table = write(tmp_path / "t", ROWS)
    part = table.select([2, 0])
    assert part.ids(0, "chosen").tolist() == [10, 11] and part.origin(1) == "dir/a:b.jsonl:1"
    assert part.lengths.tolist() == [[1, 2, 1], [2, 1, 3]]
    assert part.select(np.array([1])).ids(0, "prompt").tolist() == [1, 2]
    assert table.select([0, 1]).max_id == 9 and table.select([]).max_id == -1
    with pytest.raises(IndexError):
        table.select([3])


def test_the_digest_is_of_content_and_order(tmp_path: Path):
    table = write(tmp_path / "t", ROWS)
    same = write(tmp_path / "other", ROWS)
    assert table.digest == same.digest == table.select(range(3)).digest
    assert table.select([2, 0]).digest == write(tmp_path / "part", [ROWS[2], ROWS[0]]).digest
    others = [
        write(tmp_path / "moved", [([1], [2, 3], [4, 5, 6]), *ROWS[1:]]),
        write(tmp_path / "named", ROWS, ("prompt", "rejected", "chosen")),
        table.select([1, 0, 2]),
        table.select([0, 1]),
        table.select([]),
    ]
    assert len({table.digest, *(other.digest for other in others)}) == 6


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(
        st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=4), min_size=2, max_size=2)
    ),
    chunk=st.integers(1, 5),
    data=st.data(),
)
def test_any_rows_in_any_batches(rows, chunk, data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_table, "_CHUNK", chunk)
        table = write(tmp_path_factory.mktemp("t") / "t", rows, ("prompt", "response"))
        indices = data.draw(st.lists(st.sampled_from(range(len(rows))))) if rows else []
        part = table.select(indices)
        wanted = [rows[i] for i in indices]
        assert [[part.ids(i, c).tolist() for c in part.columns] for i in range(len(part))] == wanted
        assert part.lengths.tolist() == [[len(cell) for cell in row] for row in wanted]
        assert part.max_id == max((v for row in wanted for cell in row for v in cell), default=-1)
        again = write(tmp_path_factory.mktemp("p") / "t", wanted, ("prompt", "response"))
        assert part.digest == again.digest


def test_positions_of_documents_are_not_token_ids(tmp_path: Path):
    with TokenTableWriter(tmp_path / "t", ("text", "starts")) as writer:
        writer.add([ids([3, 4]), ids([0, 1000])], "a.txt:1")
        writer.add([ids([9, 1]), ids([0])], "b.txt:7")
        assert writer.tokens == 4
    table = TokenTable.open(tmp_path / "t")
    assert table.max_id == 9 and table.select([0]).max_id == 4
    assert [table.origin(i) for i in (0, 1)] == ["a.txt:1", "b.txt:7"]
    assert table.ids(0, "starts").tolist() == [0, 1000]


def test_an_empty_table(tmp_path: Path):
    table = write(tmp_path / "t", [])
    assert len(table) == 0 and table.lengths.shape == (0, 3) and table.max_id == -1


def test_other_processes_map_the_files_again(tmp_path: Path):
    table = write(tmp_path / "t", [([1] * 5000, [2], [3])] * 20).select(range(3, 9))
    sent = pickle.dumps(table)
    assert len(sent) < 2000
    assert pickle.loads(sent).digest == table.digest


def test_an_error_in_the_block_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(KeyError),
        new_folder(tmp_path / "new" / "deep" / "t") as new,
        TokenTableWriter(new, ("text",)) as writer,
    ):
        writer.add([ids([1])], "a:1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch):
    def refuse(self):
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(TokenTableWriter, "_finish", refuse)
    with pytest.raises(StorageError, match="cannot write .*/t: No space left on device"):
        write(tmp_path / "t", ROWS)
    assert list(tmp_path.iterdir()) == []


FILES = [
    "ids.bin",
    "bounds.bin",
    "origins.bin",
    "origin_bounds.bin",
    "origin_files.bin",
    "meta.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "short", "long", "empty"])
def test_an_incomplete_table_is_refused(name: str, damage: str, tmp_path: Path):
    write(tmp_path / "t", ROWS)
    path = tmp_path / "t" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}[damage])
    with pytest.raises(StorageError, match=f"{tmp_path}/t: no whole token table"):
        TokenTable.open(tmp_path / "t")


def test_a_table_of_another_version_is_refused(tmp_path: Path):
    write(tmp_path / "t", ROWS)
    path = tmp_path / "t" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(StorageError, match="version 99, not 1"):
        TokenTable.open(tmp_path / "t")


def test_writing_holds_a_few_rows_only(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_table, "_CHUNK", 64)
    tracemalloc.start()
    with TokenTableWriter(tmp_path / "t", ("text",)) as writer:
        for number in range(20_000):
            writer.add([np.full(100, number, dtype=np.int32)], f"a.jsonl:{number}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    table = TokenTable.open(tmp_path / "t")
    assert len(table) == 20_000 and table.ids(19_999, "text").tolist() == [19_999] * 100
    assert peak < 2**20, f"{peak} bytes for {20_000 * 400} of ids"
