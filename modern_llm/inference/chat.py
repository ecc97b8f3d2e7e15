"""Answers of a checkpoint to prompts, encoded exactly as in training: same template, same ids."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from modern_llm.config.data import known_template
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.config.printable import printable
from modern_llm.data.encode.chat_template import Template, end_tokens
from modern_llm.data.encode.tokenizer import Encoder
from modern_llm.data.read.records import Prompt, RowFault
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.shutdown.signals import stop_here
from modern_llm.inference.generate import generate, generate_ids
from modern_llm.models.load import (
    inspect_checkpoint,
    load_model,
    load_tokenizer,
)


@dataclass(frozen=True)
class Options:
    """Template, length and sampling of answers.

    Raises:
        ConfigError: an option would have no effect.
    """

    template: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        problems = [
            f"{name} has no effect at temperature 0: raise temperature or remove {name}"
            for name, given in (("top_p", self.top_p != 1.0), ("seed", self.seed is not None))
            if given and self.temperature == 0
        ]
        try:
            known_template(self.template)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError(problems)

    @property
    def drawing(self) -> dict[str, Any]:
        """The arguments for `generate`."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed or 0,
        }


class Answerer:
    """Model and tokenizer of a checkpoint, loaded to answer prompts.

    Raises:
        UserError: the checkpoint or tokenizer cannot be loaded.
    """

    def __init__(self, place: str, options: Options, tokenizer_name: str | None = None):
        heartbeat.enter("loading the model")
        checkpoint = inspect_checkpoint(place)
        if tokenizer_name is None and not checkpoint.has_tokenizer:
            raise ConfigError([f"tokenizer_name: {place} holds no tokenizer; name one"])
        self.options = options
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(tokenizer_name or place)
        self.model: PreTrainedModel = load_model(checkpoint)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return one answer per prompt."""
        rows, ends = prompt_ids(self.tokenizer, prompts, self.options.template)
        heartbeat.enter("answering")
        return generate(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.options.batch_size,
            ends=ends,
            check=_check,
            **self.options.drawing,
        )

    def stream(self, prompt: Prompt) -> str:
        """Print the answer to one prompt on stdout while it is generated, and return it."""
        rows, ends = prompt_ids(self.tokenizer, [prompt], self.options.template)
        heartbeat.enter("answering")
        streamer = _PrintableStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (ids,) = generate_ids(
            self.model,
            self.tokenizer,
            rows,
            ends=ends,
            streamer=streamer,
            check=_check,
            **self.options.drawing,
        )
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def converse(
        self, read: Callable[[], str | None], system: str | None = None
    ) -> Iterator[tuple[str, str]]:
        """Answer each prompt, printed while it is generated, and yield (prompt, answer).

        With a chat template the model reads the conversation so far; without one, only the prompt.
        An interrupt ends the answer alone: neither it nor its prompt is part of the conversation.

        Args:
            read: returns the next line, None at the end; `HELP` lists the lines that are commands.
            system: content of a system message before the first turn.
        """
        template = Template(self.tokenizer, self.options.template)
        chat = template.wraps or (template.frame is None and bool(self.tokenizer.chat_template))
        if system is not None and not chat:
            raise ConfigError(["system has no effect without a chat template: set template: chat"])
        start = [{"role": "system", "content": system}] if system is not None else []
        turns = list(start)
        while (prompt := _read_prompt(read)) is not None and prompt.strip() != "/exit":
            if prompt.strip() in ("/reset", "/new"):
                turns = list(start)
                print("a new conversation", file=sys.stderr)
            elif prompt.strip() == "/help":
                print(HELP, file=sys.stderr)
            elif prompt.strip():
                asked = [*turns, {"role": "user", "content": prompt}]
                try:
                    answer = self.stream(asked if chat else prompt)
                except KeyboardInterrupt:
                    print("\n(stopped; this turn is left out)", file=sys.stderr, flush=True)
                    continue
                turns = [*asked, {"role": "assistant", "content": answer}]
                yield prompt, answer


HELP = """\
/help   this list
/reset  a new conversation (also /new)
/exit   end; so does Ctrl-D
\\       at the end of a line: the prompt has another line
\"\"\"     alone on a line: the prompt is all lines up to the next one
Ctrl-C  ends an answer alone"""
"""Commands of a conversation, for people."""


def _read_prompt(read: Callable[[], str | None]) -> str | None:
    """Return the next prompt, of several lines where they say so; None at the end."""
    line = _read_line(read)
    if line is None:
        return None
    lines = []
    if line.strip() == '"""':
        while (line := _read_line(read)) is not None and line.strip() != '"""':
            lines.append(line)
        return "\n".join(lines)
    while line is not None and line.endswith("\\"):
        lines.append(line[:-1])
        line = _read_line(read)
    return "\n".join([*lines, *([line] if line is not None else [])])


class _PrintableStreamer(TextStreamer):
    """Prints an answer while it is generated, without control characters."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print the next piece of text."""
        super().on_finalized_text(printable(text), stream_end)


def _check() -> None:
    """Report progress to the watchdog; raise `Stopped` if a signal asked to stop."""
    heartbeat.tick()
    stop_here("while it answered; nothing is kept")


def _read_line(read: Callable[[], str | None]) -> str | None:
    """Return the next line; the watchdog ignores this wait."""
    with heartbeat.phase("waiting for a line", None, math.inf):
        return read()


def answer_prompts(
    model: str,
    prompts: Sequence[Prompt],
    *,
    tokenizer_name: str | None = None,
    **options: Any,
) -> list[str]:
    """Load a checkpoint and return its answers, one per prompt.

    Args:
        options: fields of `Options`.

    Raises:
        UserError: the checkpoint or tokenizer cannot be loaded, or an option has no effect.
    """
    return Answerer(model, Options(**options), tokenizer_name).answer(prompts)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], template: str | None
) -> tuple[list[list[int]], tuple[int | None, ...]]:
    """Return the ids of each prompt, encoded as for SFT and DPO, and the ids that end an answer.

    Args:
        prompts: strings, or message lists, which always use a chat template.
        template: as `data.template`: `chat`, a text with `{prompt}`, or a Jinja chat template.
    """
    writer, encoder = Template(tokenizer, template), Encoder(tokenizer)
    try:
        written = [writer.render(prompt) for prompt in prompts]
    except RowFault as error:
        raise UserError(f"prompt: {error}") from error
    rows = []
    for ids, (_, chat) in zip(encoder([text for text, _ in written]), written, strict=True):
        # A chat template writes the model's leading special tokens itself.
        rows.append((ids if chat else encoder.with_lead(ids)).tolist())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    # Generation needs at least one id, also for an empty prompt.
    return [row or [start] for row in rows], end_tokens(tokenizer, writer)
