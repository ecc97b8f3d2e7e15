"""Records whose content was checked: answers that are there and, in a pair, differ."""

from __future__ import annotations

from modern_llm.data.read.columns import is_empty
from modern_llm.data.read.records import (
    ContentFault,
    Instruction,
    PreferencePair,
    Prompt,
    Response,
)


def checked_pair(
    prompt: Prompt,
    chosen: Response,
    rejected: Response,
    origin: str,
    rejected_prompt: Prompt | None = None,
) -> PreferencePair:
    """Return the pair, or raise `ContentFault`."""
    # Of white space alone there is nothing to prefer: HH-RLHF has answers of one space.
    if is_empty(chosen) or is_empty(rejected):
        raise ContentFault("empty response")
    if chosen == rejected:
        raise ContentFault("equal responses")
    return PreferencePair(prompt, chosen, rejected, origin, rejected_prompt)


def checked_instruction(prompt: Prompt, response: Response, origin: str) -> Instruction:
    """Return the instruction, or raise `ContentFault`."""
    if is_empty(response):
        raise ContentFault("empty response")
    return Instruction(prompt, response, origin)
