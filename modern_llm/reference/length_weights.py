"""Sums of stored log-probs in which the tail of the longer answer counts less (LD-DPO)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from modern_llm.reference.store.entries import Entries


def desensitised(found: Entries, pairs: NDArray[np.int64], alpha: float) -> NDArray[np.float32]:
    """Return the length-desensitised sums (P, 2) of some pairs (LD-DPO, arXiv 2409.06411, eq. 9).

    Tokens up to the length of the pair's shorter answer have weight 1, those after it `alpha`.

    Args:
        found: answers with per-token values.
        pairs: (P, 2) indices into them.
    """
    assert found.tokens is not None
    counts = found.counts.astype(np.int64)
    # Sums of the first n tokens of an answer are differences of running sums.
    running = np.concatenate([[0.0], np.cumsum(found.tokens, dtype=np.float64)])
    starts = np.cumsum(counts) - counts
    shared = counts[pairs].min(1, keepdims=True)
    head = running[starts[pairs] + shared] - running[starts[pairs]]
    whole = running[starts[pairs] + counts[pairs]] - running[starts[pairs]]
    return (head + alpha * (whole - head)).astype(np.float32)
