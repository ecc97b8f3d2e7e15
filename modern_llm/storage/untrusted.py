"""Readers for small untrusted files, with limits on size, depth and time.

For configurations, notes of a run folder and the like, never for data or weights. They refuse
devices, FIFOs, endless files, and YAML that grows when its aliases are followed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from modern_llm.storage.regular_files import open_plain, read_text

LARGEST = 8_000_000
"""Bytes of a file; files written by hand have thousands."""
LARGEST_YAML = 1_000_000
"""Bytes of YAML: its parser takes seconds for more."""
DEEPEST = 60
"""Levels of nesting."""
MOST_NODES = 50_000
"""Values in a YAML file, with each alias expanded."""
LONGEST_NUMBER = 400
"""Characters of a number; converting a longer one takes time that grows with its square."""
LONGEST_LINE = 1_000_000
"""Bytes of a line of JSON lines."""
LARGEST_LINES = 1_000_000_000
"""Bytes of a JSON lines file: two million logged steps."""
LARGEST_SAMPLES = 100_000_000
"""Bytes of a file of answers, which is read whole."""
BEYOND = 1e30
"""Numbers of this size are not measurements."""

YAMLError = yaml.YAMLError


def read_json(path: str | Path, most: int = LARGEST, *, follow: bool = True) -> Any:
    """Return the value in a small JSON file.

    Raises:
        OSError: as `read_text`.
        ValueError: too large, no UTF-8, no JSON or nested too deeply.
    """
    return parse_json(read_text(path, most, follow=follow))


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, or raise `ValueError`."""
    try:
        return _of_bounded_depth(json.loads(text))
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _of_bounded_depth(value: Any) -> Any:
    """Return a value, or raise `ValueError` if it is nested too deeply to be written again."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        if not level:
            return value
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise ValueError("is nested too deeply")


def read_yaml(path: str | Path, *, follow: bool = True) -> Any:
    """Return the value in a small YAML file.

    Raises:
        OSError: as `read_text`.
        ValueError: too large, or no UTF-8.
        yaml.YAMLError: not YAML, or too large once its aliases are followed.
    """
    return parse_yaml(read_text(path, LARGEST_YAML, follow=follow))[0]


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML text, and its nodes.

    Raises:
        yaml.YAMLError: not YAML, nested too deeply, or too large once its aliases are followed.
    """
    loader = _Bounded(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, None
        _size(root, {})
        return loader.construct_document(root), root
    # A value that does not fit its explicit tag (!!bool x) raises any of these.
    except (
        ValueError, ArithmeticError, RecursionError, LookupError, AttributeError, TypeError
    ) as error:  # fmt: skip
        raise yaml.YAMLError(f"holds a value that cannot be read ({error})") from error
    finally:
        loader.dispose()


class _Bounded(yaml.SafeLoader):
    """A safe loader that stops at a depth and at a number of values."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node and count it."""
        self._depth += 1
        self._nodes += 1
        if self._depth > DEEPEST or self._nodes > MOST_NODES:
            what = f"{DEEPEST} levels" if self._depth > DEEPEST else f"{MOST_NODES:,} values"
            raise _refusal(f"more than {what}", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the number of values in a node with aliases expanded; raise if too many."""
    if id(node) in known:
        if known[id(node)] == 0:  # still being counted: a cycle
            raise _refusal("an alias to what it is part of", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.ScalarNode):
        number = node.tag.endswith((":int", ":float"))
        if number and len(node.value) > LONGEST_NUMBER:
            raise _refusal(f"a number of more than {LONGEST_NUMBER} digits", node.start_mark)
    else:
        for part in node.value:
            for inner in part if isinstance(part, tuple) else (part,):
                total += _size(inner, known)
                if total > MOST_NODES:
                    raise _refusal(
                        f"more than {MOST_NODES:,} values once its aliases are followed",
                        node.start_mark,
                    )
    known[id(node)] = total
    return total


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def json_lines(
    path: str | Path, most: int = LARGEST_LINES, *, follow: bool = True
) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line of a JSON lines file; None for a damaged line.

    An unfinished last line is left out: the writer was killed, or is still writing. Numbers that
    are not finite are read as null. One line is in memory at a time.

    Raises:
        OSError: it cannot be opened, is no regular file, or has more than `most` bytes.
    """
    number = 0
    with open_plain(path, follow=follow) as file:
        # Checked before the first line: a reader gets all of a file or nothing.
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
        while file.tell() <= most and (line := file.readline(LONGEST_LINE)):
            number += 1
            whole = line.endswith(b"\n")
            while not whole and (rest := file.readline(LONGEST_LINE)):  # too long: skip it
                line, whole = b"", rest.endswith(b"\n")
            if whole:
                yield number, _value(line)


def _value(line: bytes) -> Any:
    try:
        return _of_bounded_depth(json.loads(line, parse_constant=lambda _: None))
    except (ValueError, RecursionError):
        return None


def finite(value: Any) -> float | None:
    """Return a JSON number as a float; None for anything else, and for a number beyond 1e30."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < BEYOND else None


def whole_number(value: Any) -> int | None:
    """Return a JSON number as a count; None for anything else."""
    found = finite(value)
    return int(value) if found is not None and found == int(found) and found >= 0 else None
