"""Prefetch of the next step's micro-batches in a thread while this step computes.

One step ahead at most. An error while a step's micro-batches are built is raised in that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from modern_llm.training.task import Task


class _Made(NamedTuple):
    step: int
    tokens: int | None
    """Token budget at the time."""
    result: Future[tuple[list[Any], float]]


class Prefetch:
    """Task that builds the micro-batches and denominator of the next step in advance.

    Everything else is forwarded to the wrapped task. A context manager: its thread ends with it.

    Args:
        total: steps of the run.
    """

    def __init__(self, task: Task, device: torch.device, total: int):
        self._task, self._device, self._total = task, device, total
        self._made: _Made | None = None
        self._denominator: tuple[int, float] = (-1, 0.0)
        self._thread = ThreadPoolExecutor(1, "batches", self._begin_thread)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> Sequence[Any]:
        """Return this rank's micro-batches of `step`, and start building those of the next."""
        made, self._made = self._made, None
        # A step that ran out of memory is repeated in smaller micro-batches.
        if made is None or (made.step, made.tokens) != (step, self._task.budget.tokens):
            made = self._make(step)
        batches, denominator = made.result.result()
        self._denominator = step, denominator
        if step + 1 < self._total and self._task.ready(step + 1):
            self._made = self._make(step + 1)
        return batches

    def denominator(self, step: int) -> float:
        """Return the count over all ranks and micro-batches of `step`."""
        known, denominator = self._denominator
        return denominator if known == step else self._task.denominator(step)

    def _make(self, step: int) -> _Made:
        return _Made(step, self._task.budget.tokens, self._thread.submit(self._work, step))

    def _work(self, step: int) -> tuple[list[Any], float]:
        batches = list(self._task.micro_batches(step))
        if self._device.type == "cuda":
            # A copy overlaps with computation only if it reads pinned memory.
            batches = [batch.pin() for batch in batches]
        return batches, self._task.denominator(step)

    def _begin_thread(self) -> None:
        if self._device.type == "cuda":  # else the thread would allocate on the first GPU
            torch.cuda.set_device(self._device)
