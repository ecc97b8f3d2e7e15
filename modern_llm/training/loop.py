"""The one loop of pretraining, SFT and DPO: step, measure, report, evaluate, save, stop.

It knows an Accelerator and a Task. What a batch is and what is minimised, it does not know. Called
by
the stages with a scorer, a task and a run folder.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, Stopped, UserError
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.consensus import begin_asking, check, stop_asked
from modern_llm.storage.fault_points import around
from modern_llm.training.accumulation import accumulate, add, over_ranks
from modern_llm.training.checkpointing import format
from modern_llm.training.checkpointing.saver import OWED, Saver
from modern_llm.training.guards import loss_spikes, nonfinite
from modern_llm.training.monitoring.metrics import console_line, peak_memory_gb
from modern_llm.training.monitoring.monitor import Watch
from modern_llm.training.optim import is_due, learning_rate, make_optimizer, set_learning_rate
from modern_llm.training.prefetch import Ahead
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task

log = logging.getLogger(__name__)


class Sample(Protocol):
    """What answers fixed prompts while a run goes."""

    def start(self, step: int) -> None:
        """Make ready for a run of which `step` steps are done."""

    def __call__(self, step: int) -> dict[str, float]:
        """Answer, and return what is to be logged."""


def total_steps(config: TrainingConfig, task: Task) -> int:
    """Return the optimizer steps of the run, or raise `ConfigError` if the warm-up has more."""
    total = config.max_steps or task.steps_in(config.epochs or 1)
    if config.warmup_steps > total:
        raise ConfigError(
            [f"train.warmup_steps {config.warmup_steps} is above the {total} steps of this run"]
        )
    return total


@dataclass
class Clock:
    """Wall time and tokens since the last line; evaluation and saving are left out of the rate."""

    before: float
    began: float
    peak: float
    """Operations a second of one process's device; 0 where unknown."""
    window: float = 0.0
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, seconds: float, sums: dict[str, Tensor]) -> None:
        """Count a step, without reading what it counted."""
        self.window += seconds
        add(self.counts, {name: sums[name] for name in ("tokens", "flops")})

    def take(self) -> tuple[float, dict[str, Tensor]]:
        """Return the seconds and counts since the last line, and begin anew."""
        found = self.window, self.counts
        self.window, self.counts = 0.0, {}
        return found

    def elapsed(self) -> float:
        """Seconds since the first step began, earlier parts of the run included."""
        return self.before + time.perf_counter() - self.began


def train(
    runtime: Runtime,
    scorer: nn.Module,
    task: Task,
    config: TrainingConfig,
    run: RunFolder,
    facts: dict[str, Any],
    sample: Sample | None = None,
    peak: float = 0.0,
) -> Engine:
    """Train until the last step, or until a signal asks to stop; return what holds the weights.

    Args:
        scorer: the unprepared module; its `.model` is what is saved.
        facts: digests that a checkpoint must share with the run that goes on from it.
        sample: answers fixed prompts; asked before the first step and at `generate_every`.
        peak: operations a second of one process's device, for `mfu`; 0 where unknown.

    Raises:
        NotFiniteError: a loss or gradient is not finite; nothing of that step was applied.
        Stopped: a signal asked for it; the state is saved.
    """
    total = total_steps(config, task)
    engine, start, owed = _start_engine(runtime, scorer, config, run, facts, total)
    run.done, engine.skips_logged = start, engine.skips
    engine.model.train()
    clock = Clock(run.log().elapsed() if start else 0.0, time.perf_counter(), peak)
    task.budget.begin(runtime, run)
    saver = _saver(runtime, run, engine, facts, start, total)
    check(runtime, f"after step {start}" if start else "before the first step")
    if sample is not None:
        sample.start(start)
    with (
        Ahead(task, runtime.device, total) as task,
        Watch(config, run, total, start, runtime.is_main) as watch,
        saver,
    ):
        look = partial(_look, runtime, engine, task, config, sample, watch, total)
        if owed:
            watch.complete(start, _head(clock, task, start), look(start))
        for done in range(start + 1, total + 1):
            began = time.perf_counter()
            rate = learning_rate(config, done - 1, total)
            sums, grad_norm = _optimizer_step(runtime, engine, task, config, done - 1, rate)
            _settle_if_read(engine, config, sample, run, done, total)
            clock.add(time.perf_counter() - began, sums)
            watch.advance(done)
            record: dict[str, float] = {}
            if _is_logged(engine, config, done, total):
                record = _measured(runtime, engine, task, sums, clock, grad_norm, rate)
                watch.line(console_line(done, record))
            cut = False
            try:
                record |= look(done)
            except Stopped:
                cut = True  # what was due after this step is made when the run goes on
            if record:
                watch.record(done, _head(clock, task, done) | record)
            _save_or_stop(runtime, engine, saver, task, done, total, cut)
    return engine


def _save_or_stop(
    runtime: Runtime, engine: Engine, saver: Saver, task: Task, done: int, total: int, cut: bool
) -> None:
    """Save where it is time or where a signal asks to stop, and stop then.

    Args:
        cut: what was due after this step is still to be made.
    """
    with heartbeat.quick("deciding whether to stop", done):
        stopping = stop_asked(runtime)
    saver.look()
    if stopping or (done < total and is_due(runtime.config.save_every, done, total)):
        engine.settle()
        saver.save(done, task.consumed(done), must=bool(stopping), owed=cut)
    if stopping and (done < total or cut):
        check(runtime, f"after step {done}, saved")


def _saver(
    runtime: Runtime,
    run: RunFolder,
    engine: Engine,
    facts: dict[str, Any],
    start: int,
    total: int,
) -> Saver:
    """What writes the checkpoints, once there is room for those that will come."""
    saver, every = Saver(runtime, run, engine, facts, start), run.config.save_every
    saver.check_room((total - 1) // every - start // every)
    return saver


def _optimizer_step(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    config: TrainingConfig,
    step: int,
    rate: float,
) -> tuple[dict[str, Tensor], Tensor | float]:
    """One step of the optimizer; returns this rank's sums and the norm of the whole gradient."""
    began = time.perf_counter()
    sums, losses, busy, spiked = accumulate(runtime, engine, task, config, step, began)
    with heartbeat.quick("optimizer", step + 1):
        begin_asking(runtime)
        set_learning_rate(engine.optimizer, rate)
        # Of the step before: known by now, while the device still computes this one.
        engine.settle()
        # The norm is of the averaged gradient, so every rank sees the same and decides the same.
        update = engine.step(config.max_grad_norm)
    if engine.scales_loss:
        nonfinite.count_overflow(engine, update, step)
    elif not spiked:  # of a spike it is known what was done, and why
        engine.unsettled = partial(
            nonfinite.settle, runtime, engine, task, config, step, losses, update
        )
        if update.is_known:
            engine.settle()
    heartbeat.step_done(time.perf_counter() - began, busy)
    return sums, update.norm


def _settle_if_read(
    engine: Engine,
    config: TrainingConfig,
    sample: Sample | None,
    run: RunFolder,
    done: int,
    total: int,
) -> None:
    """Learn what became of a step before anything looks at the state after it."""
    if _is_read(engine, config, sample, done, total):
        engine.settle()
    # A step whose gradient may still turn out not to be finite is not done yet.
    run.done = done if engine.unsettled is None else done - 1


def _is_logged(engine: Engine, config: TrainingConfig, step: int, total: int) -> bool:
    """Whether a step is logged: the first, the last, every `log_every`th, and one that was skipped.

    A device that refuses a step by itself is asked about it in the next one, which is logged then.
    """
    due = is_due(config.log_every, step, total, at_end=True)
    return due or step == 1 or engine.skips > engine.skips_logged


def _is_read(
    engine: Engine, config: TrainingConfig, sample: Sample | None, step: int, total: int
) -> bool:
    """Whether anything looks at the state after a step: the log, an evaluation, sample answers, a
    checkpoint."""
    return (
        _is_logged(engine, config, step, total)
        or is_due(config.eval_every, step, total)
        or (sample is not None and is_due(config.generate_every, step, total))
        or is_due(config.save_every, step, total)
    )


def _measured(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    sums: dict[str, Tensor],
    clock: Clock,
    grad_norm: Tensor | float,
    rate: float,
) -> dict[str, float]:
    """What is logged of a step; how many were not finite and not applied, where there were any, and
    the token budget where memory had run out."""
    engine.skips_logged = engine.skips
    found = _measure(runtime, task, sums, clock)
    found |= {"grad_norm": float(grad_norm), "lr": rate}
    if skipped := engine.passed_over["total"]:
        found["skipped_steps"] = skipped
    if skipped := engine.spikes.get("skipped"):
        found["skipped_spikes"] = skipped
    if task.budget.halved and task.budget.tokens:
        found["tokens_per_micro_batch"] = task.budget.tokens
    return found


def _head(clock: Clock, task: Task, step: int) -> dict[str, float]:
    """What a record starts with."""
    return {"step": step, "elapsed_s": clock.elapsed(), "examples": task.consumed(step)}


def _look(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    config: TrainingConfig,
    sample: Sample | None,
    watch: Watch,
    total: int,
    step: int,
) -> dict[str, float]:
    """Evaluate and answer the fixed prompts where it is time; return what is to be logged.

    Raises:
        Stopped: a signal asked for it on the way.
    """
    record: dict[str, float] = {}
    if is_due(config.eval_every, step, total, at_end=True):
        record |= _evaluate(runtime, engine.model, task, watch, step)
    if sample is not None and is_due(config.generate_every, step, total, at_end=True):
        with heartbeat.phase("sample answers", step):
            record |= sample(step)
    return record


@torch.no_grad()
def _evaluate(
    runtime: Runtime, model: nn.Module, task: Task, watch: Watch, step: int
) -> dict[str, float]:
    groups = task.evaluation()
    if groups is None:
        return {}
    model.eval()
    sums: dict[str, Tensor] = {}
    for group in groups:
        with heartbeat.quick("evaluation", step):
            batches = task.prepare(model, step, [batch.to(runtime.device) for batch in group])
            for batch in batches:
                check(runtime, "during an evaluation")
                add(sums, task.run(model, batch).statistics)
    model.train()
    metrics = task.metrics(over_ranks(runtime, sums))
    watch.line(f"evaluation {console_line(step, metrics)}")
    return {f"eval/{name}": value for name, value in metrics.items()}


def _measure(
    runtime: Runtime, task: Task, sums: dict[str, Tensor], clock: Clock
) -> dict[str, float]:
    """Metrics of this step over all ranks, and the rates since the last line."""
    window, counts = clock.take()
    since = {"window": counts["tokens"], "operations": counts["flops"]}
    totals = over_ranks(runtime, sums | since)
    seconds = max(window, 1e-9)
    rate, operations = totals.pop("window") / seconds, totals.pop("operations") / seconds
    return {
        **task.metrics(totals),
        "tokens_per_second": rate,
        "mfu": operations / (clock.peak * runtime.world) if clock.peak else 0.0,
        "memory_gb": peak_memory_gb(runtime.device),
    }


def _prepared(runtime: Runtime, scorer: nn.Module, config: TrainingConfig) -> Engine:
    with heartbeat.phase("preparing the engine"):
        engine = runtime.prepare(scorer, make_optimizer(config, scorer))
    if config.skip_loss_spikes:
        engine.spikes = loss_spikes.fresh()
    return engine


def _start_engine(
    runtime: Runtime,
    scorer: nn.Module,
    config: TrainingConfig,
    run: RunFolder,
    facts: dict[str, Any],
    total: int,
) -> tuple[Engine, int, bool]:
    """Prepare the model, with the state of the checkpoint that the run goes on from if there is
    one; return the engine, the number of steps already done, and whether what was due after them is
    still owed."""
    heartbeat.enter("preparing the first step")
    found = run.standing
    if found is None and run.config.resume == "must":
        raise UserError(f"resume: {run.checkpoints} holds no checkpoint to go on from")
    if found is None:
        if runtime.is_main:
            run.log().truncate(0)
        return _prepared(runtime, scorer, config), 0, False
    place, before = found
    changed = [
        f"{name}: {str(before.get(name))[:12]} -> {str(value)[:12]}"
        for name, value in facts.items()
        if name in before and before[name] != value  # absent: a later version records it
    ]
    if changed:
        raise UserError(
            f"output_dir {run.path}: since {place.name} was written another content has come "
            f"({'; '.join(changed)}; forbidden): restore it, or name another output_dir"
        )
    step = int(before["step"])
    if step > total:
        raise UserError(
            f"{place} is past the {total} steps of this run: raise train.max_steps or "
            "train.epochs, or name another output_dir"
        )
    size = sum(file.stat().st_size for file in place.iterdir())
    reading = size / heartbeat.SLOWEST_DISK + heartbeat.DISK_PAUSE_S
    # Before it is prepared: whatever shards the weights then shards these.
    with heartbeat.phase("loading the checkpoint", None, reading), around("checkpoint.load"):
        format.load_weights(place, scorer.model)
    engine = _prepared(runtime, scorer, config)
    with heartbeat.phase("loading the checkpoint", None, reading):
        format.load_state(place, engine)
    if runtime.is_main:
        run.log().truncate(step)
        log.info("going on from %s", place)
    return engine, step, bool(before.get(OWED))
