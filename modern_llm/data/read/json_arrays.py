"""Reader of `.json` files: one array of objects, parsed element by element in a moving window.

Rows carry `file:line[index]`, because such a file is often one long line. An element that parses
but is no usable row is `Broken`; corrupt JSON ends the reading with `DataError`, because the start
of the next element is then unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from modern_llm.config.errors import DataError
from modern_llm.data.read.readers import (
    BOM,
    MAX_ROW_BYTES,
    UNREADABLE,
    Rows,
    checked,
    lines_of,
    noting,
    read_jsonl,
)
from modern_llm.data.read.records import Broken
from modern_llm.storage.regular_files import open_regular

_SPACE = re.compile(r"[ \t\r\n]*")
_HEAD = _CHUNK = 2**16


def read_json(path: Path) -> Rows:
    """Yield the objects of an array; a file of JSON lines by the wrong name is read as such."""
    with open_regular(path) as file:
        head = file.read(_HEAD).removeprefix(BOM).lstrip()
    if head[:1] != b"{":
        yield from _array(path)
        return
    first = next((line for _, line in lines_of(path) if line and not line.isspace()), b"")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        form = "a .json file holds an array of objects `[{...}, ...]` or one object a line"
        raise DataError(f"{path}:1:1: {form}") from None
    yield from read_jsonl(path)


def _array(path: Path) -> Rows:
    repeated: list[str] = []
    decoder = json.JSONDecoder(object_pairs_hook=noting(repeated))
    window = _Window(path)
    opening = window.peek()
    if opening == "":
        return
    if opening != "[":
        raise window.error("an array of objects belongs here")
    window.at += 1
    index = 0
    while window.peek() != "]":
        if index:
            if window.peek() != ",":
                raise window.error("expected ',' or ']' after an element")
            window.at += 1
            window.peek()
        line = window.line()
        repeated.clear()
        text, values = window.element(decoder, repeated)
        row = checked(values, text, f"{path}:{line}[{index}]", repeated)
        # Its column counts from the element, not from the line.
        yield replace(row, column=None) if isinstance(row, Broken) else row
        index += 1
    window.at += 1
    if window.peek():
        raise window.error("text after the end of the array")


class _Window:
    """A window of a UTF-8 file as text, extended on request; `at` is the parser's position."""

    def __init__(self, path: Path):
        self.path = path
        self.text, self.at = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._chunks = _text_chunks(path)

    def peek(self) -> str:
        """Move to the next character that is no space and return it; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on(1):
                return ""

    def element(self, decoder: json.JSONDecoder, repeated: list[str]) -> tuple[str, Any]:
        """Parse the next value and move past it; return its text and its value."""
        wanted = _CHUNK
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except RecursionError:
                raise self.error("JSON nested too deep") from None
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > MAX_ROW_BYTES:
                    raise self.error(f"element longer than {MAX_ROW_BYTES} characters") from None
                offset = error.pos - self.at
                # It may be whole in a longer window; doubled, so that retries stay cheap.
                if not self._read_on(wanted):
                    self.at += offset
                    raise self.error(f"corrupt JSON: {error.msg}") from None
                wanted *= 2
                repeated.clear()
                continue
            except ValueError as error:  # an integer with more digits than Python converts
                raise self.error(f"corrupt JSON: {error}") from None
            # A number at the end of the window may continue in the next chunk.
            if end == len(self.text) and self._read_on(1):
                continue
            text, self.at = self.text[self.at : end], end
            return text, value

    def line(self) -> int:
        """Return the number, from 1, of the current line."""
        return self._line + self.text.count("\n", 0, self.at)

    def column(self) -> int:
        """Return the number, from 1, of the current character in its line."""
        newline = self.text.rfind("\n", 0, self.at)
        return self.at - newline if newline >= 0 else self._column + self.at

    def error(self, reason: str) -> DataError:
        """Return an error at the parser's position."""
        return DataError(f"{self.path}:{self.line()}:{self.column()}: {reason}; {UNREADABLE}")

    def _read_on(self, characters: int) -> bool:
        """Drop consumed text and read at least this much more; False at the end of the file."""
        self._line, self._column = self.line(), self.column()
        parts, size = [self.text[self.at :]], 0
        self.at = 0
        while size < characters and (chunk := next(self._chunks, None)) is not None:
            parts.append(chunk)
            size += len(chunk)
        self.text = "".join(parts)
        return size > 0


def _text_chunks(path: Path) -> Iterator[str]:
    """Decode a file piece by piece; invalid UTF-8 raises with its line."""
    line, rest = 1, b""
    with open_regular(path) as file:
        data = file.read(_CHUNK).removeprefix(BOM)
        while data or rest:
            whole = rest + data
            try:
                text, rest = whole.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                if not data or error.reason != "unexpected end of data":
                    line += whole.count(b"\n", 0, error.start)
                    byte = f"byte 0x{whole[error.start]:02x}"
                    raise DataError(
                        f"{path}:{line}: invalid UTF-8 ({byte}); {UNREADABLE}"
                    ) from None
                text, rest = whole[: error.start].decode("utf-8"), whole[error.start :]
            line += text.count("\n")
            if text:
                yield text
            data = file.read(_CHUNK)
