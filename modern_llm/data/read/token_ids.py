"""Rows of token ids: data that another program has tokenised, used exactly as it is.

`inspect --tokens` writes such rows, and `reference export` writes them with log-probs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.read.columns import Values, column
from modern_llm.data.read.records import (
    ContentFault,
    Instruction,
    PreferencePair,
    RowFault,
    TokenIds,
)

_LARGEST = 2**31 - 1  # a table holds int32


def pair_of_ids(values: Values, origin: str) -> PreferencePair:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`."""
    prompt = _ids(values, "prompt_ids")
    chosen, rejected = (_response(values, name, prompt) for name in ("chosen", "rejected"))
    if np.array_equal(chosen.ids, rejected.ids):
        raise ContentFault("equal responses")
    return PreferencePair(TokenIds(prompt), chosen, rejected, origin)


def instruction_of_ids(values: Values, origin: str) -> Instruction:
    """`prompt_ids` and `response_ids` (or `completion_ids`)."""
    name = "response" if "response_ids" in values else "completion"
    prompt = _ids(values, "prompt_ids")
    return Instruction(TokenIds(prompt), _response(values, name, prompt), origin)


def _response(values: Values, name: str, prompt: NDArray[np.int32]) -> TokenIds:
    """Return the ids of a response, with the mask in `<name>_targets` where the row has one."""
    ids = _ids(values, f"{name}_ids")
    if not len(ids):
        raise ContentFault("empty response")
    if (mask := f"{name}_targets") not in values:
        return TokenIds(ids)
    trained = _numbers(column(values, mask), f"column {mask!r}", 1)
    if len(trained) != len(ids):
        raise RowFault(f"column {mask!r} has {len(trained)} numbers for {len(ids)} ids")
    if not len(prompt):
        trained[0] = 1  # never a target, since nothing precedes it: no mask is needed for it
    if not trained[not len(prompt) :].any():
        raise ContentFault("no token to train on")
    return TokenIds(ids, None if trained.all() else trained.astype(bool))


def _ids(values: Values, name: str) -> NDArray[np.int32]:
    return _numbers(column(values, name), f"column {name!r}", _LARGEST)


def _numbers(found: Any, place: str, largest: int) -> NDArray[np.int32]:
    """Return a list of whole numbers from 0 to `largest`."""
    if not isinstance(found, list):
        raise RowFault(f"{place} is {str(found)[:40]!r}, expected a list of whole numbers")
    for at, number in enumerate(found):
        if type(number) is not int or not 0 <= number <= largest:
            raise RowFault(
                f"{place}, entry {at} is {str(number)[:40]!r}, expected a whole number from 0 to "
                f"{largest}"
            )
    return np.array(found, np.int32)
