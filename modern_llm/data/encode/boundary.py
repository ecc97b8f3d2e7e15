"""Boundary between prompt and answer in token ids.

A conversation is tokenised as one text, and the answer is what follows the ids of its prompt, so
that prompt and answer together are the ids of the whole. A token that spans the boundary belongs to
the answer; both answers of a pair have the same prompt. Strings are tokenised apart, as a prompt is
at inference; a marker that the tokenizer puts before each separate text (SentencePiece's space) is
kept out of the answer unless the joined text has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.encode.chat_template import Written
from modern_llm.data.encode.tokenizer import Encoder, Ids
from modern_llm.data.encode.vocabulary import Tokenizer, special_ids

# A text after one of these is tokenised as inside a longer text.
_ANCHORS = ("\n", "\t", ".", "(", "a")
_PROBES = ("b", "5", "Word", " b")


@dataclass(frozen=True, slots=True)
class Parts:
    """One record before truncation.

    Attributes:
        columns: ids of the prompt and of each answer without its end token (of a document: of its
            text).
        ends: for each answer the id that closes it, None for none.
    """

    columns: list[Ids]
    ends: tuple[int | None, ...] = ()
    trained: tuple[NDArray[np.bool_] | None, ...] = ()
    """For each answer the mask of the ids that are trained on, None for all."""


class Boundary:
    """Splits the ids of records.

    Args:
        ends: the ids that end an answer: after a plain prompt, after one of a chat template, and
            others that such a template may write.
        append: whether an answer without an end token gets one.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: Tokenizer,
        ends: tuple[int | None, ...],
        append: bool,
    ):
        self._encoder, self._tokenizer = encoder, tokenizer
        self._special = special_ids(tokenizer)
        self.known_ends = frozenset(ends) - {None}
        self._plain_end, self._chat_end = ends[:2] if append else (None, None)
        self._blank: dict[int, bool] = {}
        self.marks = self._marks()

    def texts(self, written: Written) -> tuple[str, ...]:
        """Return the texts of a record that are to be tokenised: the prompt first."""
        if not written.chat and self.marks:
            return (written.head, *(written.head + answer for answer in written.wholes))
        return (written.head, *written.wholes)

    def split(self, texts: Sequence[str], ids: Sequence[Ids], *, chat: bool) -> Parts:
        """Return prompt and answers of the ids of `texts`."""
        if chat:
            return self._conversation(ids)
        prompt, *answers = ids
        if self.marks:
            answers = [
                self._unmarked(prompt, whole, text[len(texts[0]) :])
                for whole, text in zip(answers, texts[1:], strict=True)
            ]
        columns = [self._encoder.with_lead(prompt), *answers]
        return Parts(columns, (self._plain_end,) * len(answers))

    def _conversation(self, ids: Sequence[Ids]) -> Parts:
        size = min(common_prefix(ids[0], whole) for whole in ids[1:])
        columns, ends = [ids[0][:size]], []
        for whole in ids[1:]:
            answer, end = self.closed(whole[size:])
            columns.append(answer)
            ends.append(end)
        return Parts(columns, tuple(ends))

    def closed(self, answer: Ids) -> tuple[Ids, int | None]:
        """Return an answer cut before its end token, and the end token.

        The end token is among the special and blank tokens with which the answer ends.
        """
        start = len(answer)
        while start and self._closes(int(answer[start - 1])):
            start -= 1
        for at in range(start, len(answer)):
            if int(answer[at]) in self.known_ends:
                return answer[:at], int(answer[at])
        return answer, self._chat_end

    def _closes(self, token: int) -> bool:
        if token in self._special or token in self.known_ends:
            return True
        if token not in self._blank:
            self._blank[token] = not self._tokenizer.decode([token]).strip()
        return self._blank[token]

    def _marks(self) -> bool:
        """Whether the tokenizer puts a marker before each separately encoded text."""
        for anchor in _ANCHORS:
            first, *inside = self._encoder([anchor, *(anchor + probe for probe in _PROBES)])
            if not len(first) or any(common_prefix(first, ids) < len(first) for ids in inside):
                continue
            alone = self._encoder(_PROBES)
            return any(
                not np.array_equal(ids[len(first) :], separate)
                for ids, separate in zip(inside, alone, strict=True)
            )
        return False

    def _unmarked(self, prompt: Ids, whole: Ids, text: str) -> Ids:
        """Return the ids of an answer as they are in the joined text."""
        if common_prefix(prompt, whole) == len(prompt):
            return whole[len(prompt) :]
        # A token of the joined text spans the boundary.
        for anchor in _ANCHORS:
            first, inside = self._encoder([anchor, anchor + text])
            if len(first) and common_prefix(first, inside) == len(first):
                return inside[len(first) :]
        return self._encoder([text])[0]


def common_prefix(first: Ids, second: Ids) -> int:
    """Return the length of the common prefix of two id sequences."""
    size = min(len(first), len(second))
    differ = first[:size] != second[:size]
    return int(differ.argmax()) if differ.any() else size
