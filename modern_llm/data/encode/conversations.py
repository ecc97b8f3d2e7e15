"""Whole conversations as token ids, with masks of what the assistant wrote (`data.targets: all`).

The ids are those of the whole conversation, as the template writes it. Which characters a turn of
the assistant has is read from the template's `{% generation %}` blocks. Without these it is
measured: the conversation is rendered up to each turn, and with it, and both must begin what is
rendered with all turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.data import ConversationDatasetConfig
from modern_llm.config.errors import UserError
from modern_llm.data.encode.boundary import Boundary, Parts, common_prefix
from modern_llm.data.encode.chat_template import Template, as_messages
from modern_llm.data.encode.tokenizer import Ids
from modern_llm.data.encode.vocabulary import Tokenizer
from modern_llm.data.read.records import ContentFault, Conversation, Message, RowFault, Turns

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_INSTEAD = "give a template with {% generation %} blocks, or set targets: last"


@dataclass(frozen=True)
class _Side:
    """One conversation: its ids, which of them are trained on, where the last answer begins."""

    ids: Ids
    trained: NDArray[np.bool_]
    last: int


class WholeConversations:
    """Converter of records with several turns to ids and masks.

    Args:
        boundary: knows the end tokens.

    Raises:
        UserError: the tokenizer cannot say which characters a token has.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        boundary: Boundary,
        config: ConversationDatasetConfig,
    ):
        self._tokenizer, self._template, self._boundary = tokenizer, template, boundary
        self._marked = bool(_GENERATION.search(template.source))
        if getattr(config, "targets", "last") == "all" and not tokenizer.is_fast:
            raise UserError(
                f"data.targets: all needs a fast tokenizer, and {type(tokenizer).__name__} is "
                "none: it cannot say where the tokens of a text begin; use data.targets: last"
            )

    def __call__(self, record: Any) -> Parts:
        """Return the common start of the conversations and the rest of each, with masks.

        Raises:
            RowFault: the template refuses the messages, or does not show what the assistant wrote.
            ContentFault: the conversations, or their prompts, differ as they should not.
        """
        prompt = as_messages(record.prompt)
        other = getattr(record, "rejected_prompt", None) or prompt
        texts = {str(self._template.turns(turns, open_answer=False)) for turns in (prompt, other)}
        if len(texts) > 1:
            raise ContentFault("transcripts differ before the last turn")
        sides = [self._side(prompt, response) for response in record.responses]
        first, *others = (side.ids for side in sides)
        size = min(
            *(int(side.trained.argmax()) for side in sides),
            *(common_prefix(first, ids) for ids in others),
            len(first),
        )
        columns, ends, masks = [first[:size]], [], []
        for side in sides:
            end = int(np.flatnonzero(side.trained)[-1]) + 1
            answer, closing = side.ids[size:end], None
            if not self._marked:
                last, closing = self._boundary.closed(side.ids[side.last : end])
                answer = side.ids[size : side.last + len(last)]
            elif int(answer[-1]) not in self._boundary.known_ends:
                self._template.remarks.add(
                    "the chat template's {% generation %} blocks leave out the end token: the "
                    "model does not learn to stop"
                )
            columns.append(answer)
            ends.append(closing)
            trained = side.trained[size : size + len(answer)]
            masks.append(None if trained.all() else trained)
        if len(columns) > 2 and np.array_equal(columns[1], columns[2]):
            raise ContentFault("equal responses")
        return Parts(columns, tuple(ends), tuple(masks))

    def _side(self, prompt: list[Message], response: Turns) -> _Side:
        tools = list(getattr(prompt, "tools", ()))
        messages = Conversation.of([*prompt, *response], tools)
        trained = [len(prompt) + at for at, mine in enumerate(response.trained) if mine]
        if self._marked:
            text, spans = self._marked_spans(messages, trained)
        else:
            text, spans = self._measured_spans(messages, trained)
        spans = [(start, end) for start, end in spans if start < end]
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        found = self._tokenizer(str(text), **options)
        ids = np.array(found["input_ids"], np.int32)
        mask, last = np.zeros(len(ids), bool), 0
        for first, end in tokens_of(np.array(found["offset_mapping"]), spans):
            mask[first:end], last = True, first
        if not mask.any() or not text[slice(*spans[-1])].strip():
            raise RowFault("the chat template writes nothing for the answer")
        return _Side(ids, mask, last)

    def _marked_spans(self, messages: Conversation, trained: list[int]) -> tuple[str, list[Span]]:
        """Return the text and what `{% generation %}` marks of some turns."""
        self._template.closed(messages)  # notes keys that are not written
        text = self._template.turns(messages, open_answer=False)
        spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if len(text.generated) != len(spoken):
            raise RowFault(
                f"the chat template marks {len(text.generated)} stretches as generated and there "
                f"are {len(spoken)} turns of the assistant: give a template with one "
                "{% generation %} block a turn, or set targets: last"
            )
        by_turn = dict(zip(spoken, text.generated, strict=True))
        return text, [by_turn[at] for at in trained]

    def _measured_spans(self, messages: Conversation, trained: list[int]) -> tuple[str, list[Span]]:
        """Return the text and what some turns add to the conversation before them."""
        whole = self._template.closed(messages)
        spans = []
        for at in trained:
            before = Conversation.of(messages[:at], list(messages.tools))
            until = Conversation.of(messages[: at + 1], list(messages.tools))
            text = self._template.closed(until, noted=False)
            if not whole.startswith(text):
                raise RowFault(_rewritten(text, whole, at + 1))
            opened = self._template.turns(before, open_answer=True)
            spans.append((len(self._template.head(opened, [text], before)), len(text)))
        return whole, spans


def _rewritten(text: str, whole: str, number: int) -> str:
    size = min(len(text), len(whole))
    at = next((at for at in range(size) if text[at] != whole[at]), size)
    return (
        f"the chat template writes the conversation up to turn {number} in another way when turns "
        f"follow (from character {at + 1} on {text[at : at + 20]!r} and "
        f"{whole[at : at + 20]!r}), so that the assistant's tokens cannot be told from others: "
        f"{_INSTEAD}"
    )


def tokens_of(offsets: NDArray[np.int64], spans: list[Span]) -> list[Span]:
    """Return the tokens (first, last + 1) of stretches of characters.

    A token that begins before a stretch, or ends after it, belongs to it.

    Args:
        offsets: (tokens, 2) first character of each token and the one after its last; tokenizers
            that trim white space give an empty range for a token of white space alone.
    """
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.where(offsets[:, 0] < offsets[:, 1], offsets[:, 0], np.append(0, ends[:-1]))
    starts = np.maximum.accumulate(starts)
    return [
        (int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end, "left")))
        for start, end in spans
    ]
