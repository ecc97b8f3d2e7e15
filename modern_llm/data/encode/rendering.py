"""Chat templates, rendered within bounds and on one day.

A template comes with a checkpoint and is somebody's program. It runs in the sandbox that
`transformers` makes for it, and besides may neither run long nor make long texts. What it writes
as today's date is a day of the caller's. Called by `templates`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Sequence
from datetime import date, datetime
from datetime import time as clock
from typing import Any

from modern_llm.config.errors import DataError
from modern_llm.config.printable import one_line

SECONDS = 10.0
"""Processor time for one conversation; templates in use take milliseconds."""
LONGEST = 32_000_000
"""Characters, or items of a list, that a template may make."""
LONGEST_SOURCE = 1_000_000
LARGEST_NUMBER = 1_000_000
"""Largest count that a template may give to a function: a width, an indentation, repetitions."""
_WIDTH = re.compile(r"[%:][^a-zA-Z%]*\d{5,}|%[^a-zA-Z%]*\*")


class TemplateLimit(Exception):
    """A template that runs too long or makes too much."""


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    template: str | None,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
    day: date | None = None,
) -> str:
    """Return the text of a conversation, as `tokenizer.apply_chat_template` writes it.

    Args:
        template: comes before the tokenizer's own.
        day: what the template reads as today's date, at midnight; by default today.

    Raises:
        DataError: the template runs too long, or makes too much.
    """
    from transformers.utils import chat_template_utils as utils

    with _lock():
        before = utils._compile_jinja_template
        utils._compile_jinja_template = functools.partial(_compiled_on, day or date.today())
        try:
            return tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateLimit, MemoryError, OverflowError, RecursionError) as error:
            source = template or tokenizer.chat_template
            raise DataError(
                f"chat template {template_digest(source)} ({one_line(source)[:60]!r}): "
                f"{one_line(error) or type(error).__name__}; give another template"
            ) from error
        finally:
            utils._compile_jinja_template = before


@functools.cache
def _lock() -> threading.RLock:
    """One for the process: the renderer of `transformers` is exchanged for a moment."""
    return threading.RLock()


def template_digest(template: Any) -> str:
    """Twelve hexadecimal digits; a tokenizer may have several templates by name."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def reads_date(template: str) -> bool:
    """Whether a template can ask for today's date: the sandbox has it under one name only."""
    return "strftime_now" in template


def _check_widths(form: Any) -> None:
    if isinstance(form, str) and (len(form) > LARGEST_NUMBER or _WIDTH.search(form)):
        raise TemplateLimit("it formats text to an unreasonable width")


class _Rendering:
    """What `transformers` calls of a compiled template."""

    def __init__(self, template: Any):
        self._template, self.environment = template, template.environment
        self.day = date.today()

    def strftime_now(self, form: str) -> str:
        """Return the day as text; templates know this function by its name."""
        _check_widths(form)
        return datetime.combine(self.day, clock()).strftime(form)

    def render(self, **values: Any) -> str:
        """Return the text."""
        self.environment.began = time.thread_time()
        pieces, size = [], 0
        for piece in self._template.generate(**values):
            size += len(piece)
            if size > LONGEST:
                raise TemplateLimit(f"it writes more than {LONGEST:,} characters")
            self.environment.tick()
            pieces.append(piece)
        return "".join(pieces)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> _Rendering:
    from transformers.utils import chat_template_utils as utils

    from modern_llm.data.encode.sandbox import bounded

    if len(source) > LONGEST_SOURCE:
        raise TemplateLimit(f"it has more than {LONGEST_SOURCE:,} characters")
    made = utils._cached_compile_jinja_template("").environment
    environment = bounded(made, limit)
    made_of = _Rendering(environment.from_string(source))
    environment.globals["strftime_now"] = made_of.strftime_now
    return made_of


def _compiled_on(day: date, source: str) -> _Rendering:
    rendering = _compiled(source)
    rendering.day = day
    return rendering


def limit(began: float) -> None:
    """Refuse to run on where `SECONDS` of processor time have passed since `began`."""
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
            _check_widths(left)
    if size > LONGEST:
        raise TemplateLimit(f"{operator} makes more than {LONGEST:,} characters or digits")


def check_call(function: Any, args: Sequence[Any], named: dict[str, Any]) -> None:
    """Refuse arguments with which a function of text would make too much."""
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
        _check_widths(words[0])
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
