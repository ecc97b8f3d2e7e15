"""Whole conversations (`data.targets: all`): every turn of the assistant is trained on.

A record then holds its turns from the first one that is trained on, or, of several conversations,
from the first one in which they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modern_llm.data.encode.message_keys import REASONING
from modern_llm.data.read.columns import (
    Values,
    complete,
    is_empty,
    is_trained,
    messages_in,
    text_in,
    turns_in,
    without_weight,
)
from modern_llm.data.read.records import (
    ContentFault,
    Conversation,
    Instruction,
    Message,
    PreferencePair,
    Prompt,
    Turns,
)

# Keys in which two messages differ; others, such as a time, may differ in one and the same turn.
_SAID = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING)


def is_whole(values: Values) -> bool:
    """Whether conversations are read as a whole."""
    return getattr(values, "whole", False)


def whole_pair(values: Values, origin: str, before: str = "prompt") -> PreferencePair:
    """Two conversations with a common prefix; the column `before` may hold its start."""
    sides = [turns_in(values, name) for name in ("chosen", "rejected")]
    prompt, (chosen, rejected), other = _split(values, sides, before)
    if [_said(message) for message in chosen] == [_said(message) for message in rejected]:
        raise ContentFault("equal responses")
    return PreferencePair(prompt, chosen, rejected, origin, other)


def whole_responses(
    values: Values, sides: Sequence[list[Message]]
) -> tuple[Prompt, list[Turns], Prompt | None]:
    """Several conversations with a common prefix; the column `prompt` may hold its start.

    Returns:
        The turns that all share, what follows them in each, and the shared turns again where a
        conversation has them with other keys.
    """
    return _split(values, sides, "prompt")


def _split(
    values: Values, sides: Sequence[list[Message]], before: str
) -> tuple[Prompt, list[Turns], Prompt | None]:
    """Split conversations into the turns that all share and the rest of each."""
    sides = [_ended(_whole(values, side, before)) for side in sides]
    size = min(_shared(sides[0], side) for side in sides[1:])
    if not size:
        raise ContentFault("conversations that share no turn")
    first, *prompts = ([without_weight(m) for m in side[:size]] for side in sides)
    others = [prompt for prompt in prompts if prompt != first]
    if any(prompt != others[0] for prompt in others):
        raise ContentFault("transcripts differ before the last turn")
    second = complete(values, others[0]) if others else None
    return complete(values, first), [_response(side[size:]) for side in sides], second


def whole_instruction(
    values: Values, turns: list[Message], origin: str, size: int = 0
) -> Instruction:
    """Every turn of the assistant of weight 1 that follows another turn.

    Args:
        size: turns of a column `prompt`, which are not trained on.
    """
    turns = _ended(turns)
    after = range(max(size, 1), len(turns))
    first = next((at for at in after if _trained(turns[at])), None)
    if first is None:
        raise ContentFault("no turn before the answer")
    prompt = complete(values, [without_weight(message) for message in turns[:first]])
    return Instruction(prompt, _response(turns[first:]), origin)


def with_earlier_answers(record: Any) -> Any:
    """Return an instruction with all turns of the assistant in its prompt trained on as well.

    Formats of fields, such as Alpaca's `history`, make a prompt of turns and one answer.
    """
    if not isinstance(record, Instruction) or not isinstance(record.prompt, list):
        return record
    if not isinstance(record.response, (str, dict)):
        return record
    answer = record.response
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    turns = [*record.prompt, answer]
    spoken = (at for at, message in enumerate(turns) if at and message["role"] == "assistant")
    first = next(spoken)
    prompt = record.prompt[:first]
    tools = list(getattr(record.prompt, "tools", ()))
    prompt = Conversation.of(prompt, tools) if tools else prompt
    return Instruction(prompt, _response(turns[first:]), record.origin, record.numbers)


def _whole(values: Values, turns: list[Message], before: str) -> list[Message]:
    """Return the whole conversation that ends with the given turns."""
    start = values.get(before)
    if start is None:
        return turns
    if isinstance(start, list):
        prompt = messages_in(values, before)
        begun = [_said(m) for m in turns[: len(prompt)]] == [_said(m) for m in prompt]
        return turns if begun else [*prompt, *turns]
    spoken = next((at for at, m in enumerate(turns) if m["role"] not in ("system", "developer")), 0)
    if turns and turns[spoken]["role"] == "user":
        return turns
    question: Message = {"role": "user", "content": text_in(values, before)}
    return [*turns[:spoken], question, *turns[spoken:]]


def _ended(turns: list[Message]) -> list[Message]:
    """Return the turns up to the last one that is trained on.

    Raises:
        ContentFault: there is none, or those there are have neither words nor calls.
    """
    spoken = [at for at, message in enumerate(turns) if message["role"] == "assistant"]
    weighted = [at for at in spoken if is_trained(turns[at])]
    trained = [at for at in weighted if _trained(turns[at])]
    if not spoken:
        raise ContentFault("no assistant turn")
    if not weighted:
        raise ContentFault("no assistant turn with a weight above 0")
    if not trained:
        raise ContentFault("empty response")
    return turns[: trained[-1] + 1]


def _trained(message: Message) -> bool:
    # Of an empty turn there is nothing to learn but to stop.
    return message["role"] == "assistant" and is_trained(message) and not is_empty(message)


def _response(turns: list[Message]) -> Turns:
    response = Turns(without_weight(message) for message in turns)
    response.trained = tuple(map(_trained, turns))
    return response


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Return how many messages both begin with; the last one of each is no part of them."""
    size = 0
    for mine, theirs in zip(chosen[:-1], rejected[:-1], strict=False):
        if _said(mine) != _said(theirs):
            break
        size += 1
    return size


def _said(message: Message) -> list[Any]:
    return [message.get(key) for key in _SAID]
