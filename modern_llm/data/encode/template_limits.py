"""Bounds on the time and size of rendering a chat template, which is untrusted code."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

SECONDS = 10.0
"""Processor time for one conversation; templates in use take milliseconds."""
LONGEST = 32_000_000
"""Characters, or items of a list, that a template may make."""
LONGEST_SOURCE = 1_000_000
LARGEST_NUMBER = 1_000_000
"""Largest count that a template may give to a function: a width, an indentation, repetitions."""
_WIDTH = re.compile(r"[%:][^a-zA-Z%]*\d{5,}|%[^a-zA-Z%]*\*")


class TemplateLimit(Exception):
    """A template exceeded the limits of time or size."""


def check_widths(form: Any) -> None:
    """Refuse a format that pads to an unreasonable width."""
    if isinstance(form, str) and (len(form) > LARGEST_NUMBER or _WIDTH.search(form)):
        raise TemplateLimit("it formats text to an unreasonable width")


def limit(began: float) -> None:
    """Refuse to continue after `SECONDS` of processor time since `began`."""
    if time.thread_time() - began > SECONDS:
        raise TemplateLimit(f"it runs for more than {SECONDS:.0f} s on one conversation")


def check_growth(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation whose result would be too large."""
    sized = (str, list, tuple, bytes)
    whole = isinstance(left, int) and isinstance(right, int)
    if operator == "*" and isinstance(right, sized):
        left, right = right, left
    if operator == "*" and isinstance(left, sized) and isinstance(right, int):
        size = len(left) * right
    elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
        size = len(left) + len(right)
    elif operator == "*" and whole:
        size = (left.bit_length() + right.bit_length()) * 1000
    elif operator == "**" and whole:
        size = left.bit_length() * max(right, 0) * 1000
    else:
        size = 0
        if operator == "%":
            check_widths(left)
    if size > LONGEST:
        raise TemplateLimit(f"{operator} makes more than {LONGEST:,} characters or digits")


def check_call(function: Any, args: Sequence[Any], named: dict[str, Any]) -> None:
    """Refuse arguments that make a text function return too much."""
    for value in (*args, *named.values()):
        if isinstance(value, int) and value > LARGEST_NUMBER:
            raise TemplateLimit(f"it asks a function for {str(value)[:20]} repetitions")
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    # A method has its text as owner, a filter as argument.
    values = [v for v in (owner, *args, *named.values()) if isinstance(v, str | list | tuple)]
    words = [value for value in values if isinstance(value, str)]
    sizes = sorted(map(len, values), reverse=True)
    size = 0
    if "format" in name and words:
        check_widths(words[0])
    elif "replace" in name and len(words) >= 3:
        text, old, new = words[:3]
        size = (text.count(old) if old else len(text) + 1) * len(new)
    elif "join" in name and args:
        # What an iterator gives is not known yet: a sandboxed range has at most 100,000 items.
        unknown = 100_000 if len(sizes) < 2 else 0
        size = max(sizes[0] * max(sizes[1:2], default=0), sizes[0] * unknown) if sizes else 0
    elif "indent" in name and words:
        width = max([8, *(v for v in (*args, *named.values()) if isinstance(v, int))])
        width = max([width, *map(len, words[1:])])
        size = (words[0].count("\n") + 1) * width
    if size > LONGEST:
        raise TemplateLimit(f"{name} makes more than {LONGEST:,} characters")


def check_pieces(pieces: Sequence[str]) -> None:
    """Refuse to join pieces that are too long together."""
    if sum(map(len, pieces)) > LONGEST:
        raise TemplateLimit(f"it joins more than {LONGEST:,} characters")
