"""Chat templates, rendered within bounds and on one day.

A template comes with a checkpoint and is untrusted code. It runs in the sandbox of `transformers`
with additional limits on time and output size. The caller sets the day that it reads as today.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import time
from collections.abc import Sequence
from datetime import date, datetime
from datetime import time as clock
from typing import Any

from modern_llm.config.errors import DataError
from modern_llm.config.printable import one_line
from modern_llm.data.encode.template_limits import (
    LONGEST,
    LONGEST_SOURCE,
    TemplateLimit,
    check_widths,
)


class Rendered(str):
    """The text of a conversation, with what its template marks by `{% generation %}`."""

    generated: tuple[tuple[int, int], ...] = ()
    """(first, last + 1) characters of each marked stretch."""


def render_chat(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    template: str | None,
    tools: Sequence[Any] = (),
    add_generation_prompt: bool = False,
    day: date | None = None,
) -> Rendered:
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
        used: list[_Rendering] = []
        utils._compile_jinja_template = functools.partial(_compiled_on, day or date.today(), used)
        try:
            text = Rendered(
                tokenizer.apply_chat_template(
                    messages,
                    tools=list(tools) or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
            text.generated = tuple(used[-1].generated)
            return text
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
    """Return the lock of this process: the renderer of `transformers` is replaced temporarily."""
    return threading.RLock()


def template_digest(template: Any) -> str:
    """Twelve hexadecimal digits; a tokenizer may have several templates by name."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def reads_date(template: str) -> bool:
    """Whether a template can ask for today's date: the sandbox has it under one name only."""
    return "strftime_now" in template


class _Rendering:
    """The parts of a compiled template that `transformers` calls."""

    def __init__(self, template: Any):
        self._template, self.environment = template, template.environment
        self.day = date.today()
        self.generated: list[tuple[int, int]] = []
        # The environment is a copy, whose extensions are copies as well.
        extensions = template.environment.extensions.values()
        self._tracker = next(each for each in extensions if "generation" in each.tags)
        self._texts: list[str] = []
        self._tracker._generation_support = self._noting(self._tracker._generation_support)

    def _noting(self, support: Any) -> Any:
        @functools.wraps(support)
        def noting(context: Any, caller: Any) -> str:
            text = support(context, caller=caller)
            self._texts.append(text)
            return text

        return noting

    def strftime_now(self, form: str) -> str:
        """Return the day as text; templates know this function by its name."""
        check_widths(form)
        return datetime.combine(self.day, clock()).strftime(form)

    def render(self, **values: Any) -> str:
        """Return the text."""
        self.environment.began = time.thread_time()
        pieces, size = [], 0
        self.generated, self._texts = [], []
        with self._tracker.activate_tracker(pieces, self.generated):
            for piece in self._template.generate(**values):
                size += len(piece)
                if size > LONGEST:
                    raise TemplateLimit(f"it writes more than {LONGEST:,} characters")
                self.environment.tick()
                pieces.append(piece)
        text = "".join(pieces)
        # In a macro or a captured text the place of a block is not known when it is written.
        marked = zip(self.generated, self._texts, strict=True)
        if any(text[start:end] != block for (start, end), block in marked):
            self.generated = []
        return text


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> _Rendering:
    from transformers.utils import chat_template_utils as utils

    from modern_llm.data.encode.sandbox import bounded

    if len(source) > LONGEST_SOURCE:
        raise TemplateLimit(f"it has more than {LONGEST_SOURCE:,} characters")
    made = utils._cached_compile_jinja_template("").environment
    environment = bounded(made)
    made_of = _Rendering(environment.from_string(source))
    environment.globals["strftime_now"] = made_of.strftime_now
    return made_of


def _compiled_on(day: date, used: list[_Rendering], source: str) -> _Rendering:
    rendering = _compiled(source)
    rendering.day = day
    used.append(rendering)
    return rendering
