"""Lines, records, batches and documents between blank lines: rows, and positions of errors."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modern_llm.config.errors import DataError
from modern_llm.data.read import readers
from modern_llm.data.read.readers import Row, read_csv, read_jsonl, read_text
from modern_llm.data.read.records import Broken

GOOD = b'{"text": "a"}'


def write(tmp_path: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_lines_with_a_mark_at_the_start_and_windows_endings(tmp_path: Path):
    path = write(
        tmp_path, b'\xef\xbb\xbf{"text": "\xc3\xbc"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}'
    )
    assert list(read_jsonl(path)) == [
        Row({"text": "ü"}, f"{path}:1"),
        Row({"text": "b\u2028c"}, f"{path}:4"),
    ]


BAD_LINES = {
    "corrupt": (b'{"text": "a"', "corrupt JSON: Expecting ',' delimiter", 13),
    "cut in a string": (b'{"text": "a', "corrupt JSON: Unterminated string", 10),
    "two values": (GOOD + GOOD, "corrupt JSON: Extra data", 14),
    "duplicate key": (b'{"text": "a", "text": "b"}', "duplicate key 'text'", 15),
    "duplicate key inside": (b'{"x": {"k": 1, "k": 1}}', "duplicate key 'k'", 16),
    "raw NUL": (b'{"text": "a\0"}', "a NUL character", 12),
    "escaped NUL": (b'{"text": "a\\u0000"}', "a NUL character", 12),
    "NUL in a key": (b'{"te\\u0000xt": "a"}', "a NUL character", 5),
    "lone high surrogate": (b'{"text": "\\ud83d\\ude00 \\ud83d"}', "lone surrogate U+D83D", 24),
    "lone low surrogate": (b'{"text": ["\\ude00"]}', "lone surrogate U+DE00", 12),
    "invalid UTF-8": (b'{"text": "\xc3\xbc\xff"}', "invalid UTF-8 (byte 0xff)", 12),
    "Latin-1": ('{"text": "ü"}'.encode("latin-1"), "invalid UTF-8 (byte 0xfc)", 11),
    "array": (b'[{"text": "a"}]', "a JSON array where an object belongs", 1),
    "string": (b'"a"', "a JSON string where an object belongs", 1),
    "null": (b"null", "a JSON null where an object belongs", 1),
    "number": (b"17", "a JSON number where an object belongs", 1),
    "deep": (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep", 1),
    "long number": (b'{"text": ' + b"9" * 10_000 + b"}", "corrupt JSON: Exceeds the limit", 1),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_and_the_others_are_read(name: str, tmp_path: Path):
    line, reason, column = BAD_LINES[name]
    path = write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    first, bad, last = read_jsonl(path)
    assert first == Row({"text": "a"}, f"{path}:1")
    assert last == Row({"text": "a"}, f"{path}:3")
    assert isinstance(bad, Broken)
    assert bad.origin == f"{path}:2" and reason in bad.reason and bad.column == column
    assert str(bad).startswith(f"{path}:2:{column}: ")


@pytest.mark.parametrize("text", ["\\ud83d\\ude00", "\\\\u0000", "\\\\ud83d", "\\u00e9"])
def test_escapes_that_only_look_bad_are_read(text: str, tmp_path: Path):
    path = write(tmp_path, f'{{"text": "{text}"}}\n'.encode())
    (row,) = read_jsonl(path)
    assert row.values["text"] == json.loads(f'"{text}"')


def test_a_line_beyond_the_limit_is_skipped_in_bounded_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**16)
    long = b'{"text": "' + b"x" * 2**24 + b'"}'
    path = write(tmp_path, GOOD + b"\n" + long + b"\n" + GOOD + b"\n" + long)
    tracemalloc.start()
    rows = list(read_jsonl(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.origin for row in rows] == [f"{path}:{i}" for i in (1, 2, 3, 4)]
    assert [isinstance(row, Row) for row in rows] == [True, False, True, False]
    assert "longer than 65536 bytes" in rows[1].reason
    assert peak < 2**20, f"{peak} bytes for lines that may have {2**16}"


@pytest.mark.parametrize("length", [2**16 - 1, 2**16, 2**16 + 1])
def test_the_bound_is_exact(length: int, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2**16)
    line = b'{"text": "' + b"x" * (length - 12) + b'"}'
    rows = list(read_jsonl(write(tmp_path, line + b"\n" + GOOD)))
    assert len(rows) == 2 and isinstance(rows[1], Row)
    assert isinstance(rows[0], Row) == (length <= 2**16)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=60), st.integers(0, 2), st.integers(0, 60))
@example(b"\xef\xbb\xbf", 0, 0)
@example(b"", 1, 3)
def test_any_bytes_give_rows_that_can_be_tokenised_or_a_reason(noise: bytes, way: int, at: int):
    """Garbage alone, garbage spliced into good lines, and truncated good lines."""
    import tempfile

    content = (GOOD + b"\n") * 5
    content = [noise, content[:at] + noise + content[at:], content[:at] + noise][way]
    with tempfile.TemporaryDirectory() as folder:
        for reader in (read_jsonl, lambda path: read_text(path, "text")):
            path = write(Path(folder), content)
            for row in reader(path):
                if isinstance(row, Row):
                    text = json.dumps(row.values, ensure_ascii=False)
                    assert "\0" not in text
                    text.encode("utf-8")
                else:
                    assert row.reason
                line = int(row.origin.rpartition(":")[2])
                assert 1 <= line <= content.count(b"\n") + 1


def test_csv_with_quotes_line_breaks_and_long_fields(tmp_path: Path):
    long = "x" * 200_000
    content = f'\ufeffprompt,chosen\r\na,"b\r\n""c"""\r\n\r\n"d, e",{long}\r\n'
    path = write(tmp_path, content.encode(), "rows.csv")
    assert list(read_csv(path)) == [
        Row({"prompt": "a", "chosen": 'b\r\n"c"'}, f"{path}:2"),
        Row({"prompt": "d, e", "chosen": long}, f"{path}:5"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"a", "1 fields where the header has 2"),
        (b"a,b,c", "3 fields where the header has 2"),
        (b"a,\xff", "invalid UTF-8 (byte 0xff) in column 'chosen'"),
        (b"a\0,b", "a NUL character in column 'prompt'"),
    ],
)
def test_a_bad_record_of_csv_is_named_and_the_others_are_read(record, reason, tmp_path: Path):
    path = write(tmp_path, b"prompt,chosen\n1,2\n" + record + b"\n3,4\n", "rows.csv")
    first, bad, last = read_csv(path)
    assert (first.origin, bad.origin, last.origin) == (f"{path}:2", f"{path}:3", f"{path}:4")
    assert isinstance(bad, Broken) and reason in bad.reason


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        (b'prompt,chosen\na,b\n"open,c\nd,e\n', ":3", "corrupt CSV"),
        (b'prompt,chosen\n"a"b,c\n', ":2", "corrupt CSV"),
        (b"prompt,prompt\na,b\n", ":1", "two columns of one name"),
    ],
)
def test_csv_that_cannot_be_read_further(content: bytes, place: str, reason: str, tmp_path: Path):
    path = write(tmp_path, content, "rows.csv")
    with pytest.raises(DataError) as caught:
        list(read_csv(path))
    assert str(caught.value).startswith(f"{path}{place}: ") and reason in str(caught.value)


def texts(path: Path) -> list[tuple[str, str]]:
    return [(row.values["text"], row.origin.rpartition(":")[2]) for row in read_text(path, "text")]


def test_documents_between_blank_lines(tmp_path: Path):
    path = write(tmp_path, b"\xef\xbb\xbf\r\n\r\na \r\n b\r\n\r\n \t\r\n\r\nc\r\n", "a.txt")
    assert texts(path) == [("a \n b", "3"), ("c", "8")]


def test_without_a_blank_line_inside_each_line_is_a_document(tmp_path: Path):
    path = write(tmp_path, b"\na\nb\nc\n\n", "a.txt")
    assert texts(path) == [("a", "2"), ("b", "3"), ("c", "4")]


def test_a_bad_line_affects_only_its_document(tmp_path: Path):
    path = write(tmp_path, b"a\nb\xff\nc\n\nd\n\ne\0\n", "a.txt")
    bad, good, nul = read_text(path, "text")
    assert (bad.origin, bad.column, nul.origin) == (f"{path}:2", 2, f"{path}:7")
    assert "invalid UTF-8" in bad.reason and "NUL" in nul.reason
    assert good == Row({"text": "d"}, f"{path}:5")


def test_a_document_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    path = write(tmp_path, b"short\n\n" + b"a line\n" * 20, "a.txt")
    with pytest.raises(DataError, match=r"a\.txt:17: document longer than 100 bytes: put blank"):
        list(read_text(path, "text"))


@pytest.mark.parametrize("ending", [b"\n", b""])
def test_two_long_lines_are_two_documents(ending: bytes, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    lines = [b"a" * 60, b"b" * 60, b"c" * 99, b"d" * 99]
    path = write(tmp_path, b"\n".join(lines) + ending, "a.txt")
    assert texts(path) == [(line.decode(), str(i)) for i, line in enumerate(lines, 1)]
    path = write(tmp_path, b"\n\n".join(lines) + ending, "b.txt")
    assert [text for text, _ in texts(path)] == [line.decode() for line in lines]


def test_a_line_beyond_the_bound_is_refused_in_text_without_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 100)
    path = write(tmp_path, b"a" * 60 + b"\n" + b"b" * 150 + b"\n", "a.txt")
    with pytest.raises(DataError, match=r"a\.txt:2: document longer than 100 bytes: put line br"):
        list(read_text(path, "text"))
