"""Formats of single responses with a label, for KTO; preference pairs are read as two of them."""

from __future__ import annotations

from collections.abc import Callable

from modern_llm.data.read.columns import Values, column
from modern_llm.data.read.formats import (
    Format,
    Record,
    message_instruction,
    string_instruction,
    string_instruction_as_turns,
)
from modern_llm.data.read.rankings import best_and_worst
from modern_llm.data.read.records import (
    Instruction,
    LabelledResponse,
    PreferencePair,
    RowFault,
)
from modern_llm.data.read.token_ids import instruction_of_ids

LABEL = "label"
_WORDS = {"true": True, "false": False}  # CSV has strings only


def label_in(values: Values) -> bool:
    """Return the column `label`, which says whether the response is desirable."""
    label = column(values, LABEL)
    found = _WORDS.get(label.strip().lower()) if isinstance(label, str) else label
    if not isinstance(found, bool):
        raise RowFault(
            f"column {LABEL!r} is {label!r:.40}, expected true (desirable) or false (undesirable)"
        )
    return found


def _labelled(read: Callable[[Values, str], Record]) -> Callable[[Values, str], Record]:
    """Return a function that reads a response as `read` does, with its label."""

    def convert(values: Values, origin: str) -> LabelledResponse:
        row = read(values, origin)
        assert isinstance(row, Instruction)
        return LabelledResponse.of(row.prompt, row.response, origin, desirable=label_in(values))

    return convert


def labelled_responses(record: Record) -> tuple[Record, ...]:
    """Return a labelled response as it is, and a pair as a desirable and an undesirable one."""
    (record,) = best_and_worst(record)
    if not isinstance(record, PreferencePair):
        return (record,)
    return tuple(
        LabelledResponse.of(prompt, response, record.origin, desirable=desirable)
        for prompt, response, desirable in (
            (record.prompt, record.chosen, True),
            (record.rejected_prompt or record.prompt, record.rejected, False),
        )
    )


def _messages(values: Values) -> bool:
    lists = any(isinstance(values.get(name), list) for name in ("prompt", "completion", "response"))
    return "messages" in values or "conversations" in values or ("prompt" in values and lists)


OWN_LABELLED: list[Format] = []
"""Formats that a user registered, tried before those below; see `own_formats`."""

LABELLED = (
    Format(
        "labelled_messages",
        "prompt and completion as message lists, or messages, with label",
        lambda v: LABEL in v and _messages(v),
        _labelled(message_instruction),
    ),
    Format(
        "labelled",
        "prompt, completion or response, label",
        lambda v: (
            LABEL in v and "prompt" in v and any(name in v for name in ("completion", "response"))
        ),
        _labelled(string_instruction),
        talk=_labelled(string_instruction_as_turns),
    ),
    Format(
        "labelled_token_ids",
        "prompt_ids, completion_ids or response_ids, label",
        lambda v: (
            LABEL in v
            and "prompt_ids" in v
            and any(name in v for name in ("completion_ids", "response_ids"))
        ),
        _labelled(instruction_of_ids),
    ),
)
