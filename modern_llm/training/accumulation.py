"""The gradients of one optimizer step: its forwards and backwards, made again in smaller ones where
memory runs out.

One process alone can do that in any step. Several look for what fits in their first steps, in which
each computes by itself, all agree, and the gradients are averaged afterwards; later on, and where
DeepSpeed or FSDP meets the others within a forward, the run ends and the same command goes on with
half. Called by the loop.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.out_of_memory import is_out_of_memory
from modern_llm.storage.fault_points import around
from modern_llm.training.guards import loss_spikes, nonfinite
from modern_llm.training.guards.memory import CURES
from modern_llm.training.task import Task


class Gradients(NamedTuple):
    """What the forwards and backwards of a step gave on this rank, beside the gradients."""

    sums: dict[str, Tensor]
    losses: list[Tensor]
    """() detached, one a micro-batch."""
    busy: float
    """Seconds until this rank had to wait for another."""
    spiked: bool
    """Whether the step is passed over for its loss, on every rank; its gradients are spoiled."""


class _Short(NamedTuple):
    """Memory ran out."""

    said: str
    meets: bool
    """Whether the others may be waiting in a collective by now."""


def accumulate(
    runtime: Runtime, engine: Engine, task: Task, config: TrainingConfig, step: int, began: float
) -> Gradients:
    """Add up the gradients of `step` over its micro-batches.

    Args:
        began: when the step began, by `time.perf_counter`.

    Raises:
        UserError: memory ran out and the step cannot be made again in smaller forwards.
    """
    while True:
        apart = runtime.world > 1 and engine.recovers and task.budget.searching
        found = _attempt(runtime, engine, task, config, step, began, apart=apart)
        short = isinstance(found, _Short)
        lost = short and (found.meets or not (apart or runtime.world == 1) or not engine.recovers)
        if lost or (short and not task.budget.auto):
            raise _refusal(task, config, step, found.said)
        if apart:
            flag = torch.tensor(float(short), device=runtime.device)
            short = bool(runtime.sum(flag))
        if not short:
            if apart:
                engine.average_gradients()
                # Counted alone: a run is still young when it looks for what fits.
                _spiked(runtime, engine, task, config, step, found.sums)
            task.budget.step_done(is_main=runtime.is_main)
            return found
        engine.settle()  # it names the micro-batches of the step before, as they were
        engine.clear()
        if runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        task.budget.halve(step, Path(config.output_dir), writes=runtime.is_main)


def _attempt(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    config: TrainingConfig,
    step: int,
    began: float,
    *,
    apart: bool,
) -> Gradients | _Short:
    """Go once through the micro-batches; `apart` leaves the gradients on this rank."""
    prepared = False
    # An error is not kept: its frames hold the activations that are to be freed.
    try:
        with heartbeat.quick("loading the batch", step + 1), around("loader"):
            batches = [batch.to(runtime.device) for batch in task.micro_batches(step)]
        busy = time.perf_counter() - began
        compiles = heartbeat.COMPILE_S if config.compile else 0.0
        with heartbeat.quick("forward and backward", step + 1, compiles):
            batches = task.prepare(engine.model, step, batches)
            prepared = True
            # DDP and ZeRO average gradients over ranks: the factor undoes it. Nobody else divides.
            scale = runtime.world / task.denominator(step)
            sums: dict[str, Tensor] = {}
            losses: list[Tensor] = []
            spiked = False
            for at, batch in enumerate(batches):
                _seed(runtime.device, config.seed, step, at, runtime.rank)
                last = at == len(batches) - 1
                with engine.forward_backward(last and not apart):
                    result = task.run(engine.model, batch)
                    if runtime.stage != 3:  # there a forward waits for the weights of the others
                        busy = time.perf_counter() - began
                    losses.append(result.loss.detach())
                    loss = result.loss * scale
                    add(sums, result.statistics)
                    if last:
                        loss = nonfinite.spoiled(loss, losses)
                        # While each looks for what fits alone, it must not wait for others here.
                        spiked = not apart and _spiked(runtime, engine, task, config, step, sums)
                    engine.backward(loss * math.nan if spiked else loss, last=last)
                heartbeat.tick()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _Short(str(error), meets=runtime.world > 1 and not prepared)
    return Gradients(sums, losses, busy, spiked)


def _spiked(
    runtime: Runtime,
    engine: Engine,
    task: Task,
    config: TrainingConfig,
    step: int,
    sums: dict[str, Tensor],
) -> bool:
    """Whether the step is passed over for its loss; a collective where that is asked for."""
    if not config.skip_loss_spikes:
        return False
    loss = task.metrics(over_ranks(runtime, sums))["loss"]
    return loss_spikes.is_spike(engine, step, loss, config.skip_loss_spikes)


def _refusal(task: Task, config: TrainingConfig, step: int, said: str) -> UserError:
    """What to say of a step that cannot be made again; what is to be tried next is noted."""
    place = f"out of memory in step {step + 1}"
    if task.budget.auto:
        tokens = task.budget.halve(step, Path(config.output_dir), writes=True)
        return UserError(
            f"{place}: the processes cannot make it again together here; run the same command "
            f"again, it goes on with {tokens} tokens a forward "
            f"(train.tokens_per_micro_batch auto), or {CURES} ({_first(said)})"
        )
    return UserError(
        f"{place} with train.tokens_per_micro_batch {task.budget.tokens}: lower it, set it to "
        f"auto, or {CURES} ({_first(said)})"
    )


def _first(text: str) -> str:
    return text.split(". ")[0].splitlines()[0]


def over_ranks(runtime: Runtime, sums: dict[str, Tensor]) -> dict[str, float]:
    """One reduction for all statistics, in float64 where the device has it."""
    names = sorted(sums)
    dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
    stacked = torch.stack([sums[name].to(dtype).to(runtime.device) for name in names])
    return dict(zip(names, runtime.sum(stacked).tolist(), strict=True))


def add(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Add the statistics of a forward to those of the ones before it."""
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value


def _seed(device: torch.device, *numbers: Any) -> None:
    """Seed the generators of a step from (seed, step, micro-batch, rank): dropout resumes without
    saved state."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    # `torch.manual_seed` notes a stack for each kind of device that is not in use: 1 ms a call.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
