"""How far a log-prob may be from the stored one when the same weights score the answer again.

The one rule of a run's check before its first step and of `reference verify`. Rounding differs
where an answer is laid out among others (the order of keys in attention, the shapes of products);
in 16 bits that is what the bounds allow, in float32 they are close to equality.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import StorageError

BOUND = {"no": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Nats a token, the mean over an answer, by precision of the forward."""
SHORT = 8
"""Tokens that an answer counts as at least: rounding does not average out over fewer."""


def must_agree(
    fresh: NDArray[np.float32],
    stored: NDArray[np.float32],
    counts: NDArray[np.int64],
    precision: str,
    origin: Callable[[int], str],
    cure: str,
) -> float:
    """Return the largest difference in nats a token, or raise `StorageError` above `BOUND`.

    Args:
        fresh: (E,) log-prob sums of the answers, scored now.
        stored: (E,) those of the store.
        counts: (E,) numbers of target tokens.
        origin: file and line of an answer, by its place in these arrays.
        cure: what to do where they differ.
    """
    off = np.abs(fresh.astype(np.float64) - stored) / np.maximum(counts, SHORT)
    off = np.nan_to_num(off, nan=np.inf)
    worst, bound = int(off.argmax()), BOUND[precision]
    if not off[worst] <= bound:
        raise StorageError(
            f"{origin(worst)}: the stored log-prob is {stored[worst]:.6g}, these weights give "
            f"{fresh[worst]:.6g}: {off[worst]:.3g} nats a token apart (bound {bound:g}), so the "
            f"value is another model's; {cure}"
        )
    return float(off[worst])
