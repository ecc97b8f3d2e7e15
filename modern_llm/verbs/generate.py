"""The verb `generate`: answers to prompts, in batches, streamed, or line by line in a talk."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from modern_llm.config.errors import ConfigError
from modern_llm.config.printable import printable
from modern_llm.distributed.shutdown.signals import StopRequest
from modern_llm.verbs.settings import Settings

log = logging.getLogger(__name__)


class GenerateSettings(Settings):
    """Answer prompts with a model."""

    example: ClassVar[str] = (
        'modern-llm generate --model runs/dpo/last --template chat --prompt "Why?"'
    )

    model: str
    """Hub id, transformers folder, .pt file or a run's checkpoint (RUN/last, RUN/best)."""
    prompt: str | None = None
    """One prompt; read from --prompts, or line by line from standard input, where it is not
    given."""
    prompts: Path | None = None
    """A file of prompts: one a line, or .jsonl objects with a field prompt (a string or a list of
    messages) or messages."""
    interactive: bool = False
    """Talk: each line is answered as it is typed, with the turns before it where a chat template
    is used; /help lists the commands, Ctrl-C ends an answer, Ctrl-D the talk."""
    stream: bool = False
    """Print each answer while it is made, one prompt after the other."""
    system: str | None = None
    """Words of the system turn before the first one; needs a chat template."""
    template: str | None = None
    """chat wraps each prompt as a user turn; a text with {prompt} frames it; without it a prompt
    is continued as plain text."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that make up this share; needs a temperature above 0."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the draws, by default 0; needs a temperature above 0."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    """Prompts that are answered together; by default 16."""
    hang_timeout: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without progress after which it warns and shows its stacks; null watches nothing."""


def generate(settings: GenerateSettings) -> dict[str, Any]:
    """Answer the prompts, print and return the answers."""
    _check(settings)
    # In a talk an interrupt ends one answer.
    with nullcontext() if settings.interactive else StopRequest():
        from modern_llm.distributed.collectives import Peers
        from modern_llm.distributed.health.watchdog import Watchdog, nowhere

        with Watchdog(Peers(0, 1), nowhere, settings.hang_timeout):
            return _generate(settings)


def _generate(settings: GenerateSettings) -> dict[str, Any]:
    from modern_llm.inference.chat import Answerer, Options
    from modern_llm.inference.generate import read_prompts

    options = Options(
        template=settings.template,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=settings.batch_size or 16,
    )
    prompts = [] if settings.interactive else read_prompts(settings.prompt, settings.prompts)
    answerer = Answerer(settings.model, options, settings.tokenizer_name)
    if settings.interactive:
        found = list(answerer.converse(_read_line, settings.system))
        return {"answers": [{"prompt": line, "answer": answer} for line, answer in found]}
    written = [_with_system(prompt, settings) for prompt in prompts]
    literal = settings.template is None and any(isinstance(prompt, str) for prompt in written)
    if literal and answerer.tokenizer.chat_template:
        log.warning(
            "warning: prompts are continued as plain text, though this model has a chat template: "
            "add --template chat to ask it, or --template '{prompt}' to leave this line out"
        )
    if settings.stream:
        answers = [answerer.stream(prompt) for prompt in written]
    else:
        answers = answerer.answer(written)
        if not settings.json_output:
            for answer in answers:
                print(printable(answer))
    return {"answers": [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]}


def _check(settings: GenerateSettings) -> None:
    problems = [
        f"interactive and {name} exclude each other: keep one"
        for name in ("prompt", "prompts", "stream", "batch_size")
        if settings.interactive and getattr(settings, name)
    ]
    if settings.stream and settings.batch_size:
        problems.append("batch_size has no effect with stream: remove one")
    if settings.stream and settings.json_output:
        problems.append("stream and json exclude each other: keep one")
    given = settings.template is not None and "{prompt}" in settings.template
    if settings.system is not None and not settings.interactive and given:
        problems.append("system has no effect with a frame: use template: chat")
    if problems:
        raise ConfigError(problems)


def _with_system(prompt: str | list, settings: GenerateSettings) -> str | list:
    """The prompt as messages after the system turn, where one is given."""
    if settings.system is None:
        return prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": "system", "content": settings.system}, *turns]


def _read_line() -> str | None:
    """Return the next line of a talk; a person gets a prompt mark, a history and line editing."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - input() uses it
    while True:
        try:
            return input("> ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D ends, /help lists the commands)", file=sys.stderr)
