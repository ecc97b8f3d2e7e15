"""Gradient accumulation: the forwards and backwards of one optimizer step.

A step that runs out of memory is repeated in smaller micro-batches. A single process can do so in
any step. Several processes do so only in their first steps: each rank computes without
communication, all agree on the outcome, and the gradients are averaged afterwards. In later steps,
or where DeepSpeed or FSDP communicates within a forward, the run ends with an error and resumes
with half the size.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modern_llm.config.errors import UserError
from modern_llm.distributed.health import heartbeat
from modern_llm.models.out_of_memory import is_out_of_memory
from modern_llm.storage.fault_points import around
from modern_llm.training.context import TrainingContext
from modern_llm.training.guards import loss_spikes, nonfinite
from modern_llm.training.guards.memory import CURES
from modern_llm.training.window import add, over_ranks


class Gradients(NamedTuple):
    """Losses and counts of one step on this rank; the gradients are in the model."""

    sums: dict[str, Tensor]
    losses: list[Tensor]
    """() detached, one per micro-batch."""
    busy: float
    """Seconds of work before this rank first waited for another."""
    spiked: bool
    """Whether the step is skipped as a loss spike; its gradients are then NaN on every rank."""


class _OutOfMemory(NamedTuple):
    """Failure of a step: this rank ran out of memory."""

    message: str
    in_collective: bool
    """Whether other ranks may already wait in a collective."""


def accumulate(context: TrainingContext, step: int, began: float) -> Gradients:
    """Add up the gradients of `step` (counted from 0) over its micro-batches.

    Args:
        began: when the step began, by `time.perf_counter`.

    Raises:
        UserError: memory ran out and the step cannot be repeated in smaller micro-batches.
    """
    runtime, engine, task = context.runtime, context.engine, context.task
    while True:
        # Processes that share their rows communicate in every forward.
        apart = runtime.sequence is None
        alone = runtime.world > 1 and apart and engine.recovers and task.budget.searching
        found = _attempt(context, step, began, alone=alone)
        failed = isinstance(found, _OutOfMemory)
        if failed:
            together = runtime.world > 1 and not alone
            if found.in_collective or together or not engine.recovers or not task.budget.auto:
                raise _out_of_memory_error(context, step, found.message)
        if alone:
            flag = torch.tensor(float(failed), device=runtime.device)
            failed = bool(runtime.sum(flag))
        if not failed:
            if alone:
                if engine.reduces:  # else the step does
                    engine.average_gradients()
                _is_spike(context, step, found.sums)  # too early to skip: only updates statistics
            task.budget.step_done(is_main=runtime.is_main)
            return found
        context.guards.settle()  # its report needs the previous step's micro-batches unchanged
        engine.clear()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        task.budget.halve(step, Path(context.config.output_dir), writes=runtime.is_main)


def _attempt(
    context: TrainingContext, step: int, began: float, *, alone: bool
) -> Gradients | _OutOfMemory:
    """Run all micro-batches once; with `alone`, without averaging gradients over ranks."""
    runtime, engine, task, config = context.runtime, context.engine, context.task, context.config
    prepared = False
    # Keep only the error's text: its frames hold the activations that must be freed.
    try:
        with heartbeat.quick("loading the batch", step + 1), around("loader"):
            batches = [batch.to(runtime.device) for batch in task.micro_batches(step)]
        busy = time.perf_counter() - began
        with heartbeat.quick("forward and backward", step + 1, context.compile_s):
            batches = task.prepare(engine.model, step, batches)
            prepared = True
            # DDP and ZeRO average gradients over ranks; the factor `world` undoes that.
            scale = runtime.world / task.denominator(step)
            sums: dict[str, Tensor] = {}
            losses: list[Tensor] = []
            spiked = False
            for at, batch in enumerate(batches):
                _seed(runtime.device, config.seed, step, at, runtime.rank)
                last = at == len(batches) - 1
                with engine.forward_backward(last and not alone):
                    result = task.run(engine.model, batch)
                    # Under ZeRO-3 a forward waits for other ranks' weights, of a split row for
                    # their tokens.
                    if runtime.stage != 3 and runtime.sequence is None:
                        busy = time.perf_counter() - began
                    losses.append(result.loss.detach())
                    loss = result.loss * scale
                    add(sums, result.statistics)
                    if last:
                        loss = nonfinite.spoiled(loss, losses)
                        # A collective: a rank that computes alone must not enter it.
                        spiked = not alone and _is_spike(context, step, sums)
                    engine.backward(loss * math.nan if spiked else loss, last=last)
                heartbeat.tick()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _OutOfMemory(str(error), in_collective=runtime.world > 1 and not prepared)
    return Gradients(sums, losses, busy, spiked)


def _is_spike(context: TrainingContext, step: int, sums: dict[str, Tensor]) -> bool:
    """Whether the step is skipped as a loss spike; a collective if `skip_loss_spikes` is set."""
    sigma = context.config.skip_loss_spikes
    if not sigma:
        return False
    loss = context.task.metrics(over_ranks(context.runtime, sums))["loss"]
    return loss_spikes.is_spike(context.guards, step, loss, sigma, shown=context.runtime.is_main)


def _out_of_memory_error(context: TrainingContext, step: int, message: str) -> UserError:
    """Return the error of a step that cannot be repeated, and store half the size for a resume."""
    budget = context.task.budget
    place = f"out of memory in step {step + 1}"
    if budget.auto:
        tokens = budget.halve(step, Path(context.config.output_dir), writes=True)
        return UserError(
            f"{place}: the processes cannot repeat it together; run the same command again, it "
            f"resumes with {tokens} tokens per micro-batch "
            f"(train.tokens_per_micro_batch auto), or {CURES} ({_first(message)})"
        )
    return UserError(
        f"{place} with train.tokens_per_micro_batch {budget.tokens}: lower it, set it to "
        f"auto, or {CURES} ({_first(message)})"
    )


def _first(text: str) -> str:
    return text.split(". ")[0].splitlines()[0]


def _seed(device: torch.device, *numbers: Any) -> None:
    """Seed the generators from (seed, step, micro-batch, rank), so that dropout resumes without
    saved state."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    # `torch.manual_seed` records a stack trace for each unused kind of device: 1 ms per call.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
