"""Readers that stream the rows of one local file: JSON lines, CSV, text.

Each reader yields `Row` or `Broken` in file order and holds one row in memory; what is longer than
`MAX_ROW_BYTES` is broken, not read. A row is broken when its bytes are not what the file type
promises; `prepare` decides what happens to it. If the rest of a file is unreadable, the reader
raises `DataError`. `json_arrays` and `arrow_files` read the other types.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from modern_llm.config.errors import DataError
from modern_llm.data.read.records import Broken
from modern_llm.storage.regular_files import open_regular

MAX_ROW_BYTES = 32 * 2**20
# An escape of NUL or of half of a surrogate pair without its other half.
_BAD_ESCAPE = re.compile(
    r"\\u0000"
    r"|\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
BOM = b"\xef\xbb\xbf"
UNREADABLE = "nothing after it can be read"


@dataclass(frozen=True, slots=True)
class Row:
    """The values of one row by column, and its origin (`file:line`, `file:line[index]`)."""

    values: Mapping[str, Any]
    origin: str


Rows = Iterator[Row | Broken]


def read_jsonl(path: Path) -> Rows:
    """Yield one row for each line that is not blank."""
    for number, line in lines_of(path):
        origin = f"{path}:{number}"
        if line is None:
            yield Broken(origin, f"line longer than {MAX_ROW_BYTES} bytes")
            continue
        if line.isspace():
            continue
        yield _bad_line(line, origin) or _parse(line.decode("utf-8").rstrip("\r\n"), origin)


def _parse(text: str, origin: str) -> Row | Broken:
    """Return one JSON object, or what is wrong with it."""
    repeated: list[str] = []
    try:
        values = json.loads(text, object_pairs_hook=noting(repeated))
    except json.JSONDecodeError as error:
        return Broken(origin, f"corrupt JSON: {error.msg}", error.colno)
    except RecursionError:
        return Broken(origin, "JSON nested too deep", 1)
    except ValueError as error:  # an integer with more digits than Python converts
        return Broken(origin, f"corrupt JSON: {error}", 1)
    return checked(values, text, origin, repeated)


def noting(repeated: list[str]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Return a hook that builds objects as usual and notes duplicate keys."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))
        return values

    return build


def checked(values: Any, text: str, origin: str, repeated: list[str]) -> Row | Broken:
    """Return the value parsed from `text` as a row, or the reason why it is no row."""
    if not isinstance(values, dict):
        return Broken(origin, f"a JSON {_json_kind(values)} where an object belongs", 1)
    if repeated:
        found = list(re.finditer(re.escape(json.dumps(repeated[0])) + r"\s*:", text))
        column = found[1].start() + 1 if len(found) > 1 else None
        return Broken(origin, f"duplicate key {repeated[0]!r}", column)
    try:
        # Raw NULs and surrogates were refused before; only an escape can still make one.
        if "\\u" in text and (fault := bad_text(values)):
            escape = _BAD_ESCAPE.search(text)
            return Broken(origin, fault, escape and escape.start() + 1)
    except RecursionError:
        return Broken(origin, "JSON nested too deep", 1)
    return Row(values, origin)


def bad_text(value: Any) -> str | None:
    """Name what is no text (NUL, a lone surrogate) in any string of a nested value, else None."""
    if isinstance(value, str):
        if "\0" in value:
            return "a NUL character"
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"a lone surrogate U+{ord(value[error.start]):04X}"
        return None
    if isinstance(value, dict):
        return next(filter(None, (bad_text(v) for item in value.items() for v in item)), None)
    if isinstance(value, list):
        return next(filter(None, map(bad_text, value)), None)
    return None


def _json_kind(value: Any) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def read_csv(path: Path) -> Rows:
    """Yield one row for each record; the first record names the columns."""
    # Texts are often longer than the module's 128 KiB; its limit is one of the whole process.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    records = csv.reader(_csv_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        line = records.line_num + 1
        try:
            fields = next(records, None)
        except csv.Error as error:
            # Which quote opened the field is not known: everything after it may be misread.
            raise DataError(f"{path}:{line}: corrupt CSV: {error}; {UNREADABLE}") from None
        if fields is None:
            return
        if not fields:
            continue
        if header is not None:
            yield _record(header, fields, f"{path}:{line}")
            continue
        header = fields
        if len(set(header)) != len(header):
            raise DataError(f"{path}:{line}: two columns of one name in the header {header}")


def _csv_lines(path: Path) -> Iterator[str]:
    """Lines as text; invalid bytes become lone surrogates: they spoil a record, not the reader."""
    for number, line in lines_of(path):
        if line is None:
            raise DataError(
                f"{path}:{number}: line longer than {MAX_ROW_BYTES} bytes; {UNREADABLE}"
            )
        yield line.decode("utf-8", "surrogateescape")


def _record(header: list[str], fields: list[str], origin: str) -> Row | Broken:
    if len(fields) != len(header):
        return Broken(origin, f"{len(fields)} fields where the header has {len(header)}")
    for name, value in zip(header, fields, strict=True):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            byte = ord(value[error.start]) & 0xFF
            return Broken(origin, f"invalid UTF-8 (byte 0x{byte:02x}) in column {name!r}")
        if "\0" in value:
            return Broken(origin, f"a NUL character in column {name!r}")
    return Row(dict(zip(header, fields, strict=True)), origin)


def read_text(path: Path, column: str) -> Rows:
    """Yield documents as rows of one `column`.

    Blank lines separate documents; in a file without blank lines each line is a document.
    """
    apart = _has_blank_line_inside(path)
    part: list[str] = []
    size, origin = 0, ""
    fault: Broken | None = None
    for number, line in lines_of(path):
        blank = line is not None and line.isspace()
        if part and (blank or not apart):
            yield fault or Row({column: "\n".join(part)}, origin)
            part, size, fault = [], 0, None
        if blank:
            continue
        if line is None or size + len(line) > MAX_ROW_BYTES:
            raise DataError(
                f"{path}:{number}: document longer than {MAX_ROW_BYTES} bytes: put "
                f"{'blank lines' if apart else 'line breaks'} between documents"
            )
        if not part:
            origin = f"{path}:{number}"
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        fault = fault or _bad_line(line, f"{path}:{number}")
        part.append(text)
        size += len(line)
    if part:
        yield fault or Row({column: "\n".join(part)}, origin)


def _has_blank_line_inside(path: Path) -> bool:
    """Return whether a blank line separates two lines of text."""
    text_seen = blank_seen = False
    for _, line in lines_of(path):
        blank = line is not None and line.isspace()
        if blank_seen and not blank:
            return True
        text_seen = text_seen or not blank
        blank_seen = blank_seen or (blank and text_seen)
    return False


def _bad_line(line: bytes, origin: str) -> Broken | None:
    """Return the reason why a line is not text, with its column; None for a good line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8")) + 1
        return Broken(origin, f"invalid UTF-8 (byte 0x{line[error.start]:02x})", column)
    at = text.find("\0")
    return Broken(origin, "a NUL character", at + 1) if at >= 0 else None


def lines_of(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Number (from 1) and bytes of each line with its ending; None for one that is too long."""
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) > MAX_ROW_BYTES and not line.endswith(b"\n"):
                _skip_line(file)
                yield number, None
            elif line:
                yield number, line


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(MAX_ROW_BYTES)) and not part.endswith(b"\n"):
        pass
