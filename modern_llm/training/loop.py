"""The one loop of pretraining, SFT and DPO: step, measure, report, evaluate, save, stop.

The loop knows an Accelerator (behind `Runtime` and `Engine`) and a `Task`. It does not know what a
batch is or what is minimised. `accumulation.py` holds the forwards and backwards of one step.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, Stopped
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.consensus import begin_asking, check, stop_asked
from modern_llm.training.accumulation import accumulate
from modern_llm.training.best import PREFIX
from modern_llm.training.callbacks import Callbacks
from modern_llm.training.checkpointing.resume import start_training
from modern_llm.training.checkpointing.saver import Saver
from modern_llm.training.context import Resume, TrainingContext
from modern_llm.training.guards import nonfinite
from modern_llm.training.monitoring.metrics import console_line, peak_memory_gb
from modern_llm.training.monitoring.monitor import Monitor
from modern_llm.training.optim import is_due, learning_rate, set_learning_rate
from modern_llm.training.prefetch import Prefetch
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task
from modern_llm.training.window import add, over_ranks


class Sample(Protocol):
    """Answers fixed prompts during a run, so that the loop needs no tokenizer."""

    def start(self, step: int) -> None:
        """Prepare for a run that has done `step` steps."""

    def __call__(self, step: int) -> dict[str, float]:
        """Answer the prompts and return metrics."""


def total_steps(config: TrainingConfig, task: Task) -> int:
    """Return the optimizer steps of the run, or raise `ConfigError` if the warm-up has more."""
    total = config.max_steps or task.steps_in(config.epochs or 1)
    if config.warmup_steps > total:
        raise ConfigError(
            [f"train.warmup_steps {config.warmup_steps} is above the {total} steps of this run"]
        )
    return total


def train(
    runtime: Runtime,
    scorer: nn.Module,
    task: Task,
    run: RunFolder,
    resume: Resume,
    sample: Sample | None = None,
    peak: float = 0.0,
    callbacks: Callbacks | None = None,
) -> Engine:
    """Train until the last step, or until a signal asks to stop; return the engine.

    Args:
        scorer: the unprepared module; its `.model` is what is saved.
        run: the run folder; its `config` holds the settings.
        resume: the checkpoint to resume from, and the digests that later resumes must share.
        sample: answers fixed prompts before the first step and every `generate_every` steps.
        peak: operations per second of one process's device, for `mfu`; 0 where unknown.
        callbacks: a user's own code.

    Raises:
        NotFiniteError: a loss or gradient is not finite; nothing of that step was applied.
        Stopped: a signal asked to stop; the state is saved.
    """
    total = total_steps(run.config, task)
    context, start, pending = start_training(runtime, scorer, task, run, resume, total, peak)
    run.done = start
    context.engine.model.train()
    task.budget.begin(runtime, run)
    saver = Saver(context, resume, start)
    saver.check_room((total - 1) // run.config.save_every - start // run.config.save_every)
    check(runtime, f"after step {start}" if start else "before the first step")
    if task.between is not None:
        folder = resume.checkpoint[0] if resume.checkpoint else None
        task.between.begin(context.engine, start, context.end, folder)
    if sample is not None:
        sample.start(start)
    callbacks = (callbacks or Callbacks()).begin(context, start)
    with (
        Prefetch(task, runtime.device, total) as context.task,
        Monitor(run.config, run, total, start, runtime.is_main) as monitor,
        callbacks,
        saver,
    ):
        if pending:
            found = _evaluate_if_due(context, sample, monitor, callbacks, start)
            monitor.complete(start, _position(context, start), found)
            context.asked.clear()  # this step is saved already
        step = start
        while step < context.end:
            step += 1
            _step(context, sample, monitor, callbacks, saver, step)
        saver.finish()
        _tell(callbacks, saver, step)
    run.ended = context.ended
    return context.engine


def _step(
    context: TrainingContext,
    sample: Sample | None,
    monitor: Monitor,
    callbacks: Callbacks,
    saver: Saver,
    step: int,
) -> None:
    """Do step `step` (from 1) and what is due after it.

    Raises:
        Stopped: a signal asked to stop; the state is saved.
    """
    began = time.perf_counter()
    sums, grad_norm = _optimizer_step(context, step - 1)
    _settle_if_read(context, sample, step)
    context.window.add(step - 1, time.perf_counter() - began, sums)
    monitor.advance(step)
    callbacks.call("on_step_end", step)
    record = _log_if_due(context, monitor, callbacks, grad_norm, step)
    callbacks.decide(step)
    interrupted = False
    try:
        evaluated = _evaluate_if_due(context, sample, monitor, callbacks, step)
    except Stopped:
        evaluated, interrupted = {}, True  # rerun on resume
    if step == context.end and not record:  # ended by a callback or an evaluation
        record = _log_if_due(context, monitor, callbacks, grad_norm, step)
    if context.task.between is not None:
        context.task.between.after_step(context.engine, step, context.end)
    if record := record | evaluated:
        monitor.record(step, _position(context, step) | record)
    _save_or_stop(context, saver, callbacks, step, interrupted)


def _optimizer_step(
    context: TrainingContext, step: int
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Do one optimizer step (counted from 0).

    Returns:
        This rank's sums, and the norm of the whole gradient before clipping.
    """
    began = time.perf_counter()
    runtime, engine, guards = context.runtime, context.engine, context.guards
    sums, losses, busy, spiked = accumulate(context, step, began)
    with heartbeat.quick("optimizer", step + 1):
        begin_asking(runtime)
        set_learning_rate(engine.optimizer, learning_rate(context.config, step, context.total))
        # The finite flag of the previous step has arrived; the device still computes this step.
        guards.settle()
        # The norm of the averaged gradient is equal on every rank, so all ranks decide the same.
        update = engine.step(context.config.max_grad_norm)
    if engine.scales_loss:
        nonfinite.count_overflow(guards, update, step)
    elif not spiked:  # a spike was counted where it was found
        guards.pending = partial(nonfinite.judge, context, step, losses, update)
        if update.is_known:
            guards.settle()
    heartbeat.step_done(busy)
    return sums, update.norm


def _settle_if_read(context: TrainingContext, sample: Sample | None, step: int) -> None:
    """Wait for the finite flag of a step if a log line, evaluation or save reads its result."""
    config, total = context.config, context.total
    if (
        _is_logged(context, step)
        or is_due(config.eval_every, step, total)
        or (sample is not None and is_due(config.generate_every, step, total))
        or is_due(config.save_every, step, total)
    ):
        _settle(context, step)
    # Until its flag arrives, a step may still turn out to be non-finite.
    context.run.done = step if context.guards.pending is None else step - 1


def _settle(context: TrainingContext, step: int) -> None:
    """Wait for the finite flag of `step`."""
    with heartbeat.quick("waiting for the result", step):
        context.guards.settle()
    context.run.done = step


def _is_logged(context: TrainingContext, step: int) -> bool:
    """Whether a step is logged: the first, the last, every `log_every`th, and a skipped one.

    The device reports a skipped step during the next step, which is then logged instead.
    """
    due = is_due(context.config.log_every, step, context.end, at_end=True)
    return due or step == 1 or context.guards.skipped > context.guards.logged


def _log_if_due(
    context: TrainingContext,
    monitor: Monitor,
    callbacks: Callbacks,
    grad_norm: Tensor | float,
    step: int,
) -> dict[str, float]:
    """Print a line if one is due, and return its metrics, else nothing."""
    if not _is_logged(context, step):
        return {}
    _settle(context, step)
    record = _training_metrics(context, grad_norm, step)
    monitor.line(console_line(step, record))
    callbacks.call("on_log", step, record)
    return record


def _training_metrics(
    context: TrainingContext, grad_norm: Tensor | float, step: int
) -> dict[str, float]:
    """Return the logged metrics: averages over all examples since the last line, rates, skips and
    token budget. `grad_norm` and `lr` are those of this step."""
    runtime, task, guards = context.runtime, context.task, context.guards
    guards.logged = guards.skipped
    with heartbeat.quick("averaging the metrics", step):
        totals, speed = context.window.take(runtime)
    metrics = {
        **task.metrics(totals),
        **speed,
        "memory_gb": peak_memory_gb(runtime.device),
        "grad_norm": float(grad_norm),
        "lr": learning_rate(context.config, step - 1, context.total),
    }
    if guards.nonfinite["total"]:
        metrics["skipped_steps"] = guards.nonfinite["total"]
    if guards.spikes.get("skipped"):
        metrics["skipped_spikes"] = guards.spikes["skipped"]
    if task.budget.halved and task.budget.tokens:
        metrics["tokens_per_micro_batch"] = task.budget.tokens
    return metrics


def _position(context: TrainingContext, step: int) -> dict[str, float]:
    """Return step, elapsed seconds and examples seen."""
    examples = context.task.consumed(step)
    return {"step": step, "elapsed_s": context.window.elapsed(), "examples": examples}


def _evaluate_if_due(
    context: TrainingContext,
    sample: Sample | None,
    monitor: Monitor,
    callbacks: Callbacks,
    step: int,
) -> dict[str, float]:
    """Evaluate and answer the fixed prompts if it is time or asked; return metrics.

    Raises:
        Stopped: a signal arrived during the evaluation.
    """
    config, metrics = context.config, {}
    due = is_due(config.eval_every, step, context.end, at_end=True)
    if due or "evaluate" in context.asked:
        context.asked.discard("evaluate")
        _settle(context, step)
        metrics |= _evaluate(context, monitor, step)
    if metrics:
        _follow(context, step, metrics)
        callbacks.call("on_evaluate", step, dict(metrics))
        callbacks.decide(step)
    if sample is not None and is_due(config.generate_every, step, context.end, at_end=True):
        with heartbeat.phase("sample answers", step):
            metrics |= sample(step)
    return metrics


def _follow(context: TrainingContext, step: int, metrics: dict[str, float]) -> None:
    """Ask for a save of the best evaluation so far, and end the run if there was none for long."""
    best = context.best
    if best is None:
        return
    if best.look(step, metrics) and context.config.keep_best:
        context.asked.add("save")
    if best.exhausted and step < context.end:
        context.end_at(step, f"{best.since} evaluations since the best, {best}")


@torch.no_grad()
def _evaluate(context: TrainingContext, monitor: Monitor, step: int) -> dict[str, float]:
    runtime, task, model = context.runtime, context.task, context.engine.model
    groups = task.evaluation()
    if groups is None:
        return {}
    model.eval()
    sums: dict[str, Tensor] = {}
    for group in groups:
        with heartbeat.quick("evaluation", step, context.compile_s):
            batches = task.prepare(model, step, [batch.to(runtime.device) for batch in group])
            for batch in batches:
                check(runtime, "during an evaluation")
                add(sums, task.run(model, batch).statistics)
    model.train()
    with heartbeat.quick("averaging the evaluation", step):
        metrics = task.metrics(over_ranks(runtime, sums))
    monitor.line(f"evaluation {console_line(step, metrics)}")
    return {f"{PREFIX}{name}": value for name, value in metrics.items()}


def _save_or_stop(
    context: TrainingContext, saver: Saver, callbacks: Callbacks, step: int, interrupted: bool
) -> None:
    """Save if it is time or asked; on a signal save and raise `Stopped`.

    Args:
        interrupted: the evaluation after this step was interrupted and must be rerun on resume.
    """
    runtime, end = context.runtime, context.end
    with heartbeat.quick("deciding whether to stop", step):
        stopping = stop_asked(runtime)
    saver.look()
    asked = "save" in context.asked
    context.asked.discard("save")
    due = step < end and is_due(context.config.save_every, step, end)
    if stopping or due or asked:
        _settle(context, step)
        examples = context.task.consumed(step)
        saver.save(step, examples, must=bool(stopping), pending_evaluation=interrupted)
    _tell(callbacks, saver, step)
    if stopping and (step < end or interrupted):
        check(runtime, f"after step {step}, saved")


def _tell(callbacks: Callbacks, saver: Saver, step: int) -> None:
    """Tell the callbacks of the checkpoints that were completed since the last call."""
    for folder in saver.completed():
        callbacks.call("on_checkpoint", step, folder)
