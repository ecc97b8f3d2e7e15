"""Engines: a prepared model with its optimizer, backward passes, and one step on all ranks.

`Engine` uses Accelerate alone (one process, DDP, FSDP2); in `DeepSpeedEngine` DeepSpeed reduces,
clips and steps. Both need to know the last backward of a step, divide nothing, and return the norm
of the whole gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from modern_llm.distributed import deepspeed_release
from modern_llm.distributed.health.heartbeat import waiting
from modern_llm.distributed.linked_optimizers import SplitWeights
from modern_llm.storage.fault_points import around


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside all wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class Flag:
    """A boolean on its way from the device to the host.

    Reading waits only for work that the device got before it.
    """

    def __init__(self, value: Tensor):
        """`value` is a () float tensor, 1 for yes."""
        self._value, self._there = value, None
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> bool:
        """Return the value."""
        if self._there is not None:
            self._there.synchronize()
        return bool(self._value)


@dataclass(frozen=True)
class Update:
    """Result of one optimizer step; the same on every rank."""

    norm: Tensor | float
    """() norm of the whole gradient before clipping."""
    refused: Flag | bool
    """Whether the gradient was not finite; weights and moments are then unchanged."""

    @property
    def is_known(self) -> bool:
        """Whether `applied` can be read without waiting for the device."""
        return not isinstance(self.refused, Flag)

    @property
    def grad_norm(self) -> float:
        """The norm; waits for the device."""
        return float(self.norm)

    @property
    def applied(self) -> bool:
        """Whether weights and moments were stepped; may wait for the device."""
        return not (self.refused.read() if isinstance(self.refused, Flag) else self.refused)


class Engine:
    """Engine with Accelerate alone: gradients are on the parameters, the optimizer is ours."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self.accelerator = accelerator
        self.inner = model.model
        """The unwrapped model, with the names and parameters that are saved."""
        self.reduces = not isinstance(optimizer, SplitWeights)
        """Whether a step's last backward averages the gradients over processes. DDP would do it in
        the dtype of the weights."""
        if self.reduces:
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
        else:
            self.model = accelerator.prepare_model(model, evaluation_mode=True)  # without DDP
            self.optimizer = accelerator.prepare_optimizer(optimizer)

    @property
    def decides_on_device(self) -> bool:
        """Whether the fused optimizer's kernels skip a non-finite step, which the host learns
        later. On a CPU the host decides at once."""
        # A loss scaler reads the flag itself; with sharded parameters torch refuses a plain flag.
        on_device = self.accelerator.device.type == "cuda" and isinstance(self._base, AdamW)
        return on_device and not self.scales_loss and self.recovers

    @cached_property
    def _base(self) -> torch.optim.Optimizer:
        """The optimizer inside all wrappers."""
        return innermost(self.optimizer)

    @cached_property
    def recovers(self) -> bool:
        """Whether an interrupted backward leaves only gradients behind, so that it can be
        repeated."""
        return not any(hasattr(parameter, "to_local") for parameter in self.inner.parameters())

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler is active, which overflows now and then."""
        return self.accelerator.scaler is not None

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the loss scaler's state as plain values, None without a scaler."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore the loss scale on resume."""
        if state and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state)

    def forward_backward(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and its backward; only the `last` of a step reduces."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        # Accelerate's own backward divides by its gradient accumulation, which a script or an
        # environment variable may have set; the loop already divides.
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def use_written_weights(self) -> None:
        """Let forwards use weights that were written into `optimizer_shards.pieces`; a collective.

        Here forwards read them directly.
        """

    def reshard(self) -> None:
        """Drop whole weights, which FSDP2 may keep after a forward that no backward followed."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def release(self) -> None:
        """Free references that keep the weights in memory; the engine cannot train afterwards."""

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def average_gradients(self) -> None:
        """Average the gradients of backwards that did not reduce; a collective."""
        world = dist.get_world_size()
        for parameter in self.inner.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                kind = parameter.grad_dtype or parameter.dtype
                parameter.grad = torch.zeros_like(parameter, dtype=kind)
            # Divide before the reduction, as DDP does.
            parameter.grad.div_(world)
            with around("collective.gradients"), waiting():
                dist.all_reduce(parameter.grad)

    def step(self, max_norm: float | None) -> Update:
        """Clip, step and clear the gradients."""
        if not self.reduces and dist.is_initialized():
            self.average_gradients()
        limit = max_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.decides_on_device:
            return self._step_if_finite(norm)
        finite = bool(torch.isfinite(norm))
        # A scaler detects overflow and skips by itself.
        if finite or self.scales_loss:
            self.optimizer.step()
        self.clear()
        skipped = self.scales_loss and self.accelerator.optimizer_step_was_skipped
        return Update(float(norm), refused=skipped or not (finite or self.scales_loss))

    def _step_if_finite(self, norm: Tensor) -> Update:
        """Step if the norm () is finite, without waiting for the device."""
        bad = 1.0 - torch.isfinite(norm).to(torch.float32)
        fused = self._base
        # The interface of GradScaler: with a flag of 1 the kernels do nothing, and the step count
        # is restored.
        fused.found_inf = bad
        try:
            self.optimizer.step()
        finally:
            del fused.found_inf
        self.clear()
        return Update(norm, Flag(bad))


class DeepSpeedEngine(Engine):
    """Engine with DeepSpeed, which owns the gradients; its boundary is a step's last backward."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        super().__init__(accelerator, model, optimizer)
        self.stage = int(self.model.zero_optimization_stage())
        # Accelerate's wrapper hides the groups of the partitioned optimizer.
        self.optimizer = self.model.optimizer

    def use_written_weights(self) -> None:
        """Convert the float32 weights to those of forwards, on all ranks."""
        with around("collective.weights"), waiting():
            if self.stage in (1, 2):
                self.optimizer.update_lp_params()
            elif self.stage == 3:
                self.optimizer.checkpoint_event_prologue()  # partitions what is gathered
                for group in range(len(self.optimizer.fp16_groups)):
                    self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
                self.optimizer.checkpoint_event_epilogue()

    def release(self) -> None:
        """Remove DeepSpeed's hooks and tables, which would keep the model in memory."""
        deepspeed_release.destroy(self.model)

    @cached_property
    def recovers(self) -> bool:
        """False: DeepSpeed keeps parts of gradients in its own buffers."""
        return False

    @property
    def scales_loss(self) -> bool:
        """Whether DeepSpeed's loss scaler is active."""
        return bool(self.model.fp16_enabled())

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the state of DeepSpeed's loss scaler."""
        if not self.scales_loss:
            return None
        scaler = vars(self.optimizer.loss_scaler)
        return {name: value for name, value in scaler.items() if isinstance(value, int | float)}

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Restore the state of DeepSpeed's loss scaler."""
        if state and self.scales_loss:
            vars(self.optimizer.loss_scaler).update(state)

    def forward_backward(self, last: bool) -> AbstractContextManager[Any]:
        """Return an empty context: the boundary is set in the backward."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last one finishes their reduction."""
        # Accelerate's own backward would step at once, before the norm can be checked.
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        self.model.backward(loss)

    def step(self, max_norm: float | None) -> Update:
        """Step; DeepSpeed clips by its configuration, except at stage 0."""
        if self.stage == 0:
            parameters = [p for p in self.model.module.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))
            finite = norm == norm and abs(norm) != float("inf")
            if not finite:
                self.model.zero_grad()
                return Update(norm, refused=True)
            self.model.step()
            return Update(norm, refused=False)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        return Update(float("inf") if norm is None else float(norm), refused=overflow)
