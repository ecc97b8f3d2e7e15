"""Forwards of one model side by side on the cores of a CPU, each on few of them.

Two forwards on a core each take less time than one on two cores twice: no core waits for another
within an operation, and what Python does for one forward overlaps with the arithmetic of the other.
Called by `scoring`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from modern_llm.models.scorer import TokenScorer

# Python's lock lets about this many forwards of small layers run before one waits for another.
MOST = 8

T = TypeVar("T")
R = TypeVar("R")


def lanes(module: nn.Module, device: torch.device) -> int:
    """Return how many forwards of `module` may run at once here; 1 where it is not known to bear
    it.

    What DeepSpeed or FSDP wraps meets other processes in its forward, routers collect their choices
    in the model, and a rotary scaling that follows the length changes its tables.
    """
    if device.type != "cpu" or type(module) is not TokenScorer or module.has_experts:
        return 1
    kinds = {str(getattr(part, "rope_type", "default")) for part in module.modules()}
    if any("dynamic" in kind or "longrope" in kind for kind in kinds):
        return 1
    return min(MOST, torch.get_num_threads())


def in_order(function: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """Yield `function(item)` in the order of the items, up to `lanes` of them computed at once.

    Raises:
        Whatever `function` raises, in the place of its result; what was begun after it is lost.
    """
    if lanes == 1:
        yield from map(function, items)
        return
    begun: deque[Future[R]] = deque()
    with _cores_shared(lanes), ThreadPoolExecutor(lanes, "forward") as pool:
        try:
            for item in items:
                begun.append(pool.submit(function, item))
                # One more than lanes: none stands idle while the caller looks at a result.
                if len(begun) > lanes:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


@contextmanager
def _cores_shared(lanes: int) -> Iterator[None]:
    """Let threads begun from now on compute on their share of the cores."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // lanes))
    try:
        yield
    finally:
        torch.set_num_threads(cores)
