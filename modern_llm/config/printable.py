"""Text from data, models and configurations, made safe for a terminal.

A control sequence in a row could hide, forge or rewrite lines on the screen, and a bidirectional
override shows text in another order than it has. Every outlet to a terminal uses these functions:
logs, error lines, tables, answers and JSON results. Files keep the text as it is.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

# C0 and C1 controls but tab and newline; bidirectional marks, overrides and isolates; line and
# paragraph separators; lone surrogates; invisible marks, fillers and tags. Joiners and wide spaces
# are ordinary text in many scripts.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    """Return text with its terminal controls written as escapes; newlines and tabs are kept."""
    return _UNSAFE.sub(_escape, str(text))


def one_line(text: object) -> str:
    """Return text on one line: as `printable`, with whitespace folded into single spaces."""
    return printable(" ".join(re.split(r"[ \t\n\v\f\r\x85\u2028\u2029]+", str(text)))).strip()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text for a message of ours; its type if it says nothing.

    Errors of libraries may run over a screen, and raise without a word.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:200]


def printable_values(value: Any) -> Any:
    """Return nested plain values with every string, names of fields included, made `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable_values(k): printable_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [printable_values(item) for item in value]
    return value


class PrintableFormatter(logging.Formatter):
    """Log lines whose arguments cannot control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().format(record))


def json_line(value: Any) -> str:
    """Return a value as one line of JSON; controls become JSON escapes, so it parses the same."""
    return _UNSAFE.sub(_json_escape, json.dumps(value, ensure_ascii=False))


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if ord(match[0]) != 0x7F else "\\u007f"
