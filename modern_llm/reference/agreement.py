"""Bounds on the difference between a stored log-prob and the same answer scored again.

They serve the check before a run's first step and `reference verify`. Rounding depends on the other
answers of a forward (order of keys in attention, shapes of products): the bounds allow for that in
16 bits, and are close to equality in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from modern_llm.config.errors import StorageError
from modern_llm.reference.store.entries import Entries

BOUND = {"no": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Nats per token, the mean over an answer, by precision of the forward."""
SHORT = 8
"""A shorter answer counts as this many tokens: rounding does not average out over fewer."""


def must_agree(
    fresh: Entries,
    stored: Entries,
    precision: str,
    origin: Callable[[int], str],
    fix: str,
) -> float:
    """Return the largest difference in nats per token, or raise `StorageError` above `BOUND`.

    Args:
        fresh: answers scored now.
        stored: the same answers in the store.
        origin: returns file and line of an answer, by its index among these.
        fix: what the user can do if they differ.
    """
    wrong = np.flatnonzero(fresh.counts != stored.counts)
    if len(wrong):
        at = int(wrong[0])
        raise StorageError(
            f"{origin(at)}: the stored value counts {stored.counts[at]} tokens, the answer has "
            f"{fresh.counts[at]}; {fix}"
        )
    off = np.abs(fresh.sums.astype(np.float64) - stored.sums) / np.maximum(stored.counts, SHORT)
    off = np.nan_to_num(off, nan=np.inf)
    worst, bound = int(off.argmax()), BOUND[precision]
    if not off[worst] <= bound:
        raise StorageError(
            f"{origin(worst)}: the stored log-prob is {stored.sums[worst]:.6g}, these weights give "
            f"{fresh.sums[worst]:.6g}: {off[worst]:.3g} nats per token apart (bound {bound:g}), so "
            f"the value is another model's; {fix}"
        )
    return float(off[worst])
