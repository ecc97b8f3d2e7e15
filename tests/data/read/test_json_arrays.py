"""Arrays of objects: any layout gives the same rows, and errors name the exact position."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config.errors import DataError
from modern_llm.data.read import json_arrays
from modern_llm.data.read.json_arrays import read_json
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import Broken


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "rows.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text(st.characters(exclude_characters="\0", codec="utf-8")), values)


def has_nul(value: object) -> bool:
    return "\0" in json.dumps(value, ensure_ascii=False) or "\\u0000" in json.dumps(value)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(objects.filter(lambda o: not has_nul(o)), max_size=6),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
    st.integers(1, 40),
)
def test_any_layout_and_window_gives_the_rows(rows, indent, ascii_only, chunk):
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_arrays, "_CHUNK", chunk)
        path = write(Path(folder), text)
        found = list(read_json(path))
    assert [row.values for row in found] == rows
    for index, row in enumerate(found):
        line = int(row.origin.removeprefix(f"{path}:").partition("[")[0])
        assert row.origin == f"{path}:{line}[{index}]"
        assert text.split("\n")[line - 1].lstrip(" [").startswith("{")


@pytest.mark.parametrize("chunk", [1, 2**16])
def test_unusable_elements_are_named_and_the_others_read(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "_CHUNK", chunk)
    path = write(tmp_path, '[{"a": 1},\n 789,\n {"a": "\\ud800"}, {"a": 1, "a": 2},\n{"a": 2}]\n')
    first, number, surrogate, twice, last = read_json(path)
    assert first == Row({"a": 1}, f"{path}:1[0]") and last == Row({"a": 2}, f"{path}:4[4]")
    assert number == Broken(f"{path}:2[1]", "a JSON number where an object belongs")
    assert surrogate == Broken(f"{path}:3[2]", "a lone surrogate U+D800")
    assert twice == Broken(f"{path}:3[3]", "duplicate key 'a'")


CORRUPT = {
    "unfinished element": ('[{"a": 1},\n  {"a": ', ":2:9: corrupt JSON: Expecting value"),
    "unfinished array": ('[{"a": 1},\n{"a": 2}\n', ":3:1: expected ',' or ']'"),
    "no comma": ('[{"a": 1}\n {"a": 2}]', ":2:2: expected ',' or ']'"),
    "comma at the end": ('[{"a": 1},\n]', ":2:1: corrupt JSON: Expecting value"),
    "bare word": ('[{"a": 1},\n\n  {"a": what}]', ":3:9: corrupt JSON: Expecting value"),
    "text after the end": ('[{"a": 1}]\nmore', ":2:1: text after the end"),
    "no array": ('"a"', ":1:1: an array of objects belongs here"),
    "one object": ('{\n"data": [{"a": 1}]}', ":1:1: a .json file holds an array"),
    "too deep": ("[" + '{"a":' * 100_000, ":1:2: JSON nested too deep"),
    "invalid UTF-8": (b'[{"a": 1},\n{"a": "\xff"}]', ":2: invalid UTF-8 (byte 0xff)"),
    "UTF-8 cut short": (b'[{"a": 1},\n{"a": "\xc3', ":2: invalid UTF-8 (byte 0xc3)"),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize("chunk", [3, 2**16])
def test_a_corrupt_array_is_refused_with_line_and_column(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_arrays, "_CHUNK", chunk)
    content, message = CORRUPT[name]
    path = write(tmp_path, content)
    with pytest.raises(DataError) as caught:
        list(read_json(path))
    assert str(caught.value).startswith(f"{path}{message}")


def test_lines_of_objects_under_the_wrong_name_are_read_as_lines(tmp_path: Path):
    path = write(tmp_path, '\n{"a": 1}\n{"a": 2}\n')
    assert [row.origin for row in read_json(path)] == [f"{path}:2", f"{path}:3"]


@pytest.mark.parametrize("content", ["", " \n", "[]", "[ ]\n", "\ufeff[]"])
def test_nothing_gives_no_rows(content: str, tmp_path: Path):
    assert list(read_json(write(tmp_path, content))) == []


def test_a_long_array_needs_the_memory_of_a_window(tmp_path: Path):
    row = json.dumps({"a": "x" * 1000})
    path = write(tmp_path, "[" + ",".join([row] * 6_000) + "]")
    tracemalloc.start()
    count = sum(1 for _ in read_json(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 6_000
    assert peak < 2**21, f"{peak} bytes for a file of {path.stat().st_size}"


def test_an_element_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(json_arrays, "MAX_ROW_BYTES", 2**18)
    path = write(tmp_path, '[{"a": 1},\n{"a": "' + "x" * 2**20)
    with pytest.raises(DataError, match=r":2:1: element longer than 262144 characters"):
        list(read_json(path))
