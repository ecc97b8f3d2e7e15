"""Records made from rows before tokenisation: pairs, instructions, labelled responses, documents.

Texts are literal: nothing is stripped, joined or trimmed. A prompt is a string or a list of
messages `{"role": ..., "content": ...}`; a response is a string or one message, with every key that
a chat template may write (reasoning, tool calls). Both may be token ids. The two
faults say what a format function found wrong: `RowFault` is broken structure (an error unless the
user skips such rows), `ContentFault` is content that cannot be learnt from (dropped and counted).
`formats` makes these; `tokenize` and `prepare` consume them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class TokenIds:
    """Token ids in place of a text; `trained` marks the ones that are targets, None for all."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_] | None = None


Prompt = str | list[Message] | TokenIds
Response = str | Message | list[Message] | TokenIds


class Conversation(list[Message]):
    """Messages with the tools that the assistant may call in them, as the chat template takes
    them (JSON schemas of functions)."""

    tools: tuple[Any, ...] = ()

    @classmethod
    def of(cls, messages: list[Message], tools: list[Any]) -> Conversation:
        """Return `messages` with `tools`."""
        conversation = cls(messages)
        conversation.tools = tuple(tools)
        return conversation


class Turns(list[Message]):
    """Several messages that follow a prompt; `trained` says of each whether it is trained on."""

    trained: tuple[bool, ...] = ()


def answered(prompt: list[Message], answer: Message) -> list[Message]:
    """Return the conversation up to and including its answer, with the tools of the prompt."""
    tools = getattr(prompt, "tools", ())
    whole = [*prompt, answer]
    return Conversation.of(whole, list(tools)) if tools else whole


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One prompt with the answer that was preferred and the one that was not.

    `rejected_prompt` is there where the row holds the prompt of the rejected answer with other keys
    in its messages; both must render to the same text.
    """

    prompt: Prompt
    chosen: Response
    rejected: Response
    origin: str
    rejected_prompt: Prompt | None = None
    numbers: Mapping[str, float] | None = None
    """`weight` and `margin`, where the row has them."""

    @property
    def responses(self) -> tuple[Response, ...]:
        """(chosen, rejected): the order of the columns of a table of pairs."""
        return (self.chosen, self.rejected)


MOST_RESPONSES = 16
"""Most responses of a ranking."""
LEVELS = tuple(f"level_{number}" for number in range(1, MOST_RESPONSES + 1))
"""Numbers of a row that say how its responses rank: 0 for the best, equal for ties, -1 for none."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """One prompt with several responses, the best one first.

    `levels` has 0 for the best response and more for worse ones; responses of one level tied.
    """

    prompt: Prompt
    responses: tuple[Response, ...]
    levels: tuple[int, ...]
    origin: str
    rejected_prompt: Prompt | None = None
    numbers: Mapping[str, float] | None = None
    """The levels, one for each of `LEVELS`, and `weight`, where the row has it."""

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        responses: Sequence[Response],
        levels: Sequence[int],
        origin: str,
        rejected_prompt: Prompt | None = None,
    ) -> Ranking:
        """Return the record with its levels as numbers."""
        padded = [*levels, *[-1] * (MOST_RESPONSES - len(levels))]
        numbers = dict(zip(LEVELS, map(float, padded), strict=True))
        return cls(prompt, tuple(responses), tuple(levels), origin, rejected_prompt, numbers)

    def pair(self, better: int, worse: int) -> PreferencePair:
        """Return two of the responses as a pair, without the levels."""
        numbers = {n: v for n, v in (self.numbers or {}).items() if n not in LEVELS}
        return PreferencePair(
            self.prompt,
            self.responses[better],
            self.responses[worse],
            self.origin,
            self.rejected_prompt,
            numbers or None,
        )


@dataclass(frozen=True, slots=True)
class Instruction:
    """One prompt with its answer."""

    prompt: Prompt
    response: Response
    origin: str
    numbers: Mapping[str, float] | None = None
    """The number that `data.order` sorts by, where it names a column."""

    @property
    def responses(self) -> tuple[Response, ...]:
        """(response,): the order of the columns of a table of instructions."""
        return (self.response,)


@dataclass(frozen=True, slots=True)
class LabelledResponse:
    """One prompt with a response and whether it is desirable."""

    prompt: Prompt
    response: Response
    origin: str
    numbers: Mapping[str, float] | None = None
    """`label`, 1 where desirable and 0 where not, and the number that `data.order` sorts by."""

    @classmethod
    def of(
        cls, prompt: Prompt, response: Response, origin: str, *, desirable: bool
    ) -> LabelledResponse:
        """Return the record with its label as a number."""
        return cls(prompt, response, origin, {"label": float(desirable)})

    @property
    def responses(self) -> tuple[Response, ...]:
        """(response,): the order of the columns of a table of labelled responses."""
        return (self.response,)


@dataclass(frozen=True, slots=True)
class Document:
    """One text for pretraining."""

    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used: origin and reason; `kind` is the name it is counted under."""

    origin: str
    reason: str
    kind: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A row that could not be read.

    `origin` is `file:line`; `column` counts characters from 1 and is None where it is not known.
    """

    origin: str
    reason: str
    column: int | None = None

    def __str__(self) -> str:
        place = self.origin if self.column is None else f"{self.origin}:{self.column}"
        return f"{place}: {self.reason}"

    def dropped(self) -> Dropped:
        """The same as an entry of the list of dropped rows."""
        where = "" if self.column is None else f"column {self.column}: "
        return Dropped(self.origin, where + self.reason, BROKEN)


BROKEN = "broken structure"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Placeholder of a value that could not be read; a fault only if its column is needed."""

    reason: str


class RowFault(ValueError):
    """A row whose structure violates its format."""


class ContentFault(ValueError):
    """A well-formed row with nothing to learn from; its message is the name it is counted under."""
