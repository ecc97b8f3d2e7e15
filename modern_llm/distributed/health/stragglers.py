"""Warnings about processes whose steps work much longer than those of the others."""

from __future__ import annotations

import logging
import statistics
from typing import Any

from modern_llm.distributed.health.heartbeat import REMEMBERED

log = logging.getLogger(__name__)

FACTOR = 2.0
LEAST_S = 0.005
"""Steps shorter than this differ by chance."""


class Stragglers:
    """Warns once about each slow process, and again if it was as fast as the others in between."""

    def __init__(self) -> None:
        self._named: set[int] = set()

    def look(self, beats: dict[int, dict[str, Any]]) -> None:
        """Compare all processes over their last `REMEMBERED` steps.

        Args:
            beats: rank -> `busy`, [shortest, median] seconds of these steps; `steps`, their number;
                `host`.
        """
        known = {r: b for r, b in beats.items() if b["steps"] >= REMEMBERED}
        if len(known) < 2:
            return
        for rank, beat in known.items():
            others = statistics.median(b["busy"][1] for r, b in known.items() if r != rank)
            shortest = beat["busy"][0]
            if shortest <= FACTOR * max(others, LEAST_S):
                self._named.discard(rank)
            elif rank not in self._named:
                self._named.add(rank)
                log.warning(
                    "warning: rank %d (%s) took more than %.1f s in each of its last %d steps, the "
                    "others %.2f s: all wait for it; check that machine",
                    rank,
                    beat["host"],
                    shortest,
                    REMEMBERED,
                    others,
                )
