"""Parallel forwards of one model on the cores of a CPU, each on few of them.

Two forwards on one core each take less time than two in turn on both cores: no core waits for
another within an operation, and Python's work for one forward overlaps with the other's arithmetic.
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

MOST = 8
"""Most forwards at once; with more, forwards of small layers wait for Python's lock."""

T = TypeVar("T")
R = TypeVar("R")


def lanes(module: nn.Module, device: torch.device) -> int:
    """Return how many forwards of `module` may run at once; 1 if it is not known to be thread-safe.

    A module wrapped by DeepSpeed or FSDP, or whose rows are split over processes, runs collectives
    in its forward, routers record their
    choices in the model, and a rotary scaling that depends on the length changes its tables.
    """
    if device.type != "cpu" or type(module) is not TokenScorer or module.has_experts:
        return 1
    if module.sequence is not None:
        return 1
    kinds = {str(getattr(part, "rope_type", "default")) for part in module.modules()}
    if any("dynamic" in kind or "longrope" in kind for kind in kinds):
        return 1
    return min(MOST, torch.get_num_threads())


def in_order(function: Callable[[T], R], items: Iterable[T], lanes: int) -> Iterator[R]:
    """Yield `function(item)` in the order of the items, up to `lanes` of them computed at once.

    An exception of `function` is raised in place of its result; later results are lost.
    """
    if lanes == 1:
        yield from map(function, items)
        return
    begun: deque[Future[R]] = deque()
    with _cores_shared(lanes), ThreadPoolExecutor(lanes, "forward") as pool:
        try:
            for item in items:
                begun.append(pool.submit(function, item))
                # One more than lanes: none is idle while the caller handles a result.
                if len(begun) > lanes:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


@contextmanager
def _cores_shared(lanes: int) -> Iterator[None]:
    """Let threads started in the body compute on their share of the cores."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // lanes))
    try:
        yield
    finally:
        torch.set_num_threads(cores)
