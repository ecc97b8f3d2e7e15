"""Reference that follows the policy (TR-DPO, Gorbatovski et al., 2024, arXiv 2404.09656).

After every `every` optimizer steps the reference becomes alpha * policy + (1 - alpha) * reference.
The order of the data is known, so the pairs of the next `every` steps, a window, are then scored at
once: with the reference's weights in the policy's place, in the micro-batches of training. Steps in
between cost what they cost with stored values.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config.errors import Stopped
from modern_llm.data.batch.collate import MicroBatch
from modern_llm.data.batch.micro_batches import BatchSource, Lazy
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.consensus import check
from modern_llm.reference.moving_weights import FILE, MovingWeights

log = logging.getLogger(__name__)


class MovingReference:
    """Reference values of the current window.

    Args:
        source: of the training pairs.
        values: (P, 2) sums of the first window's reference, for every pair; copied.
        every: optimizer steps of a window.
        alpha: weight of the policy in the new reference.
        score: (model, micro-batch) -> (p, 2) sums.
    """

    def __init__(
        self,
        runtime: Runtime,
        source: BatchSource,
        values: NDArray[np.float32],
        *,
        every: int,
        alpha: float,
        score: Callable[[nn.Module, MicroBatch], Tensor],
    ):
        self._runtime, self._source, self._score = runtime, source, score
        self._every, self._alpha = every, alpha
        self._values = values.copy()
        self._weights = MovingWeights()

    def begin(self, engine: Engine, step: int, end: int, checkpoint: Path | None) -> None:
        """Copy the policy's weights before step 1, or resume after `step` steps; a collective.

        Raises:
            Stopped: a signal asked to stop.
        """
        if checkpoint is None:
            self._weights.copy(engine)
            return
        self._weights.load(engine, checkpoint)
        if self._every <= step < end:
            # All of the window, so that the micro-batches are those of a run without a break.
            self._score_window(engine, step - step % self._every, end)

    def after_step(self, engine: Engine, step: int, end: int) -> None:
        """Move the reference if a window ends with `step` steps, and score the next window.

        If a signal stops the scoring, the loop saves, and the resumed run scores the window.
        """
        if step % self._every:
            return
        with heartbeat.phase("moving the reference", step):
            self._weights.mix(engine, self._alpha)
        if step < end:
            with suppress(Stopped):
                self._score_window(engine, step, end)

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's pieces of the reference's weights, for a checkpoint."""
        return {FILE: self._weights.tensors}

    def fill(self, batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch of training with its reference values."""
        values = torch.from_numpy(self._values[batch.examples])
        return replace(batch, reference=values.to(batch.ids.device))

    def _score_window(self, engine: Engine, first: int, end: int) -> None:
        """Score the pairs of the window that begins after `first` steps."""
        began, model = time.perf_counter(), engine.model
        last = min(first + self._every, end)
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        with self._weights.in_place(engine):
            model.eval()
            for batch in self._batches(first, last):
                check(self._runtime, "while the reference was scored")
                with heartbeat.quick("scoring the window", first):
                    sums = self._score(model, batch.to(self._runtime.device))
                    found.append((batch.examples, sums.float().cpu().numpy()))
            model.train()
        with heartbeat.quick("sharing the reference", first):
            everyone = [part for parts in self._runtime.gather(found) for part in parts]
        for pairs, sums in everyone:
            self._values[pairs] = sums
        if self._runtime.is_main:
            log.info(
                "reference: alpha %g after step %d; %d pairs of steps %d to %d scored in %.1f s",
                self._alpha,
                first,
                sum(len(pairs) for pairs, _ in everyone),
                first + 1,
                last,
                time.perf_counter() - began,
            )

    def _batches(self, first: int, last: int) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of some steps, each pair once."""
        order = self._source.order
        done = np.zeros(len(self._values), bool)
        for step in range(first, last):
            pairs = order.step(step)
            pairs = pairs[~done[pairs]]
            done[pairs] = True
            if len(pairs):
                yield from Lazy(self._source, self._source.parts(pairs)[self._source.rank])
