"""Callbacks: a user's own code at fixed places of the loop, and requests that all ranks follow.

    class Watch(ml.Callback):
        def on_evaluate(self, state, control, metrics):
            if metrics["eval/rewards/margins"] > 5:
                control.stop("margins above 5")

    ml.dpo(model, pairs, output_dir="runs/dpo", callbacks=[Watch()])

Every rank calls its own copies. An error in one ends the run with its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import Stopped, UserError, close_to
from modern_llm.distributed.health import heartbeat
from modern_llm.training.context import TrainingContext


@dataclass(frozen=True)
class TrainState:
    """Where a run is, for its callbacks; equal on all ranks but for `rank`."""

    step: int
    """Optimizer steps done."""
    total: int
    """Optimizer steps of the whole run."""
    epoch: float
    """Share of the data seen, 1.0 for all of it once."""
    examples: int
    """Examples seen on all ranks."""
    config: TrainingConfig
    model: nn.Module
    """The trained model without wrappers. Under ZeRO-3 or FSDP its weights are sharded."""
    optimizer: torch.optim.Optimizer
    rank: int
    local_rank: int
    """Number of this process on its machine."""
    world: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files of a run."""
        return self.rank == 0


class Control:
    """Requests of callbacks. One rank's request is followed by all ranks, at the same step."""

    def __init__(self) -> None:
        self._asked: dict[str, str] = {}

    def stop(self, reason: str = "a callback asked") -> None:
        """End the run after this step as after its last: evaluate, write the final model."""
        self._asked.setdefault("stop", reason)

    def save(self) -> None:
        """Save a checkpoint after this step."""
        self._asked["save"] = ""

    def evaluate(self) -> None:
        """Evaluate after this step; after the next one if asked by `on_evaluate`."""
        self._asked["evaluate"] = ""

    def take(self) -> dict[str, str]:
        """Return the requests since the last call; for the loop."""
        asked, self._asked = self._asked, {}
        return asked


class Callback:
    """Base class with empty methods; any object with some of these methods is a callback.

    Requests to `control` are followed by all ranks after the step in which they were made; those of
    `on_train_begin` and `on_checkpoint` after the next step.
    """

    def on_train_begin(self, state: TrainState, control: Control) -> None:
        """Called before the first step, on resume before the first one that is not done yet."""

    def on_step_end(self, state: TrainState, control: Control) -> None:
        """Called after each optimizer step, also after one that was skipped."""

    def on_log(self, state: TrainState, control: Control, metrics: dict[str, float]) -> None:
        """Called with the metrics of a logged line, averages since the last one."""

    def on_evaluate(self, state: TrainState, control: Control, metrics: dict[str, float]) -> None:
        """Called with the metrics of an evaluation, under the names of `metrics.jsonl`."""

    def on_checkpoint(self, state: TrainState, control: Control, folder: Path) -> None:
        """Called when the checkpoint in `folder` is complete; it may be of an earlier step."""

    def on_train_end(self, state: TrainState, control: Control) -> None:
        """Called after the last step, before the final model is written, and when a signal stops
        the run; not after an error."""


EVENTS = (
    "on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_checkpoint", "on_train_end",
)  # fmt: skip
_REQUESTS = ("stop", "save", "evaluate")


class Callbacks:
    """The callbacks of one run, and what they have asked for.

    Raises:
        UserError: an object has no method of a callback, or an unknown `on_...` method.
    """

    def __init__(self, callbacks: Iterable[Any] = ()):
        self._all = [_checked(callback) for callback in callbacks]
        self._control = Control()
        self._context: TrainingContext | None = None
        self._step = 0

    def begin(self, context: TrainingContext, step: int) -> Callbacks:
        """Compare the callbacks of all ranks, and call `on_train_begin`.

        Raises:
            UserError: another rank has other callbacks.
        """
        self._context, self._step = context, step
        names = [type(callback).__name__ for callback in self._all]
        for rank, theirs in enumerate(context.runtime.gather(names)):
            if theirs != names:
                raise UserError(
                    f"callbacks: this rank has {names or 'none'}, rank {rank} has "
                    f"{theirs or 'none'}: give the same ones on every rank"
                )
        self.call("on_train_begin", step)
        return self

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, Stopped):
            self.call("on_train_end", self._step)

    def call(self, event: str, step: int, *values: Any) -> None:
        """Call one method of every callback; an error names callback, method and step in a note."""
        self._step = step
        if not self._all:
            return
        state = self._state(step)
        with heartbeat.phase("callbacks", step):
            for callback in self._all:
                method = getattr(callback, event, None)
                if method is None:
                    continue
                try:
                    method(state, self._control, *values)
                except Exception as error:
                    error.add_note(f"raised by {type(callback).__name__}.{event} at step {step}")
                    raise

    def decide(self, step: int) -> None:
        """Follow the requests of all ranks; a collective, unless there are no callbacks."""
        if not self._all:
            return
        context, mine = self._context, self._control.take()
        flags = torch.tensor([float(name in mine) for name in _REQUESTS])
        with heartbeat.quick("deciding what callbacks asked for", step):
            asked = dict(zip(_REQUESTS, context.runtime.begin_sum(flags)().tolist(), strict=True))
            context.asked |= {name for name in ("save", "evaluate") if asked[name]}
            if asked["stop"] and step < context.end:
                reasons = context.runtime.gather(mine.get("stop"))
                context.end_at(step, next(reason for reason in reasons if reason is not None))

    def _state(self, step: int) -> TrainState:
        context, runtime = self._context, self._context.runtime
        return TrainState(
            step,
            context.total,
            step / max(context.task.steps_in(1), 1),
            context.task.consumed(step),
            context.config,
            context.engine.inner,
            context.engine.optimizer,
            runtime.rank,
            runtime.accelerator.local_process_index,
            runtime.world,
        )


def _checked(callback: Any) -> Any:
    from modern_llm.training.trainer_callbacks import adapted, is_trainer_callback

    if is_trainer_callback(callback):
        return adapted(callback)
    if isinstance(callback, type):
        raise UserError(f"callbacks: {callback.__name__} is a class: give an object of it")
    methods = [name for name in dir(callback) if name.startswith("on_")]
    unknown = [name for name in methods if name not in EVENTS]
    kind = type(callback).__name__
    if unknown:
        raise UserError(
            f"callbacks: {kind}.{unknown[0]} is never called{close_to(unknown[0], EVENTS)}: the "
            f"methods are {', '.join(EVENTS)}"
        )
    if not methods:
        raise UserError(
            f"callbacks: {kind} has no method of a callback: give it one of {', '.join(EVENTS)}"
        )
    return callback
