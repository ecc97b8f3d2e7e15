"""A prepared model and its optimizer: backward passes that add up, then one step of all ranks.

`Engine` is Accelerate alone (one process, DDP, FSDP2); `DeepSpeedEngine` lets DeepSpeed reduce,
clip and step. Both are told which backward is the last of a step, divide nothing, and report the
norm of the whole gradient. Made by `Runtime.prepare`; used by the loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from modern_llm.distributed.faults import around
from modern_llm.distributed.progress import waiting


class Update(NamedTuple):
    """What became of one optimizer step."""

    grad_norm: float
    """Norm of the whole gradient before clipping, the same on every rank."""
    applied: bool
    """False where the gradient was not finite: weights and moments are as before."""


class Engine:
    """Accelerate's own way: gradients on the parameters, the optimizer in our hands."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        self.accelerator = accelerator
        self.inner = model.model
        """What the scorer wraps: the names and parameters that are saved."""
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.skipped_in_a_row = 0
        self.passed_over = {"total": 0, "in_a_row": 0}
        """Steps whose gradient was not finite, without a scaler; part of the state."""

    @property
    def recovers(self) -> bool:
        """Whether a backward pass that broke off leaves nothing behind but gradients: nobody else
        keeps or reduces parts of them."""
        return not any(hasattr(parameter, "to_local") for parameter in self.inner.parameters())

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler is at work, for which an overflow now and then is expected."""
        return self.accelerator.scaler is not None

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the loss scaler's state as plain values, or None where there is no scaler."""
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else None

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Go on with the scale of an earlier part of the run."""
        if state and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state)

    def forward_backward(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a forward and its backward; only the `last` of a step reduces."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`."""
        self.accelerator.backward(loss)

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def average_gradients(self) -> None:
        """Reduce the gradients of backwards none of which was the last; a collective."""
        world = dist.get_world_size()
        for parameter in self.inner.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            # Divided first, as DDP does.
            parameter.grad.div_(world)
            with around("collective.gradients"), waiting():
                dist.all_reduce(parameter.grad)

    def step(self, max_norm: float | None) -> Update:
        """Clip, step and clear the gradients."""
        limit = max_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        finite = bool(torch.isfinite(norm))
        # With a scaler, the scaler itself looks for overflow and skips.
        if finite or self.scales_loss:
            self.optimizer.step()
        self.clear()
        skipped = self.scales_loss and self.accelerator.optimizer_step_was_skipped
        return Update(float(norm), applied=not skipped and (finite or self.scales_loss))


class DeepSpeedEngine(Engine):
    """DeepSpeed's way: it owns the gradients, and its boundary is the last backward of a step."""

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
    ):
        super().__init__(accelerator, model, optimizer)
        self.stage = int(self.model.zero_optimization_stage())
        # Accelerate's wrapper hides the groups of the partitioned optimizer.
        self.optimizer = self.model.optimizer

    @property
    def recovers(self) -> bool:
        """DeepSpeed keeps parts of gradients in buffers of its own."""
        return False

    @property
    def scales_loss(self) -> bool:
        """Whether DeepSpeed's own loss scaler is at work."""
        return bool(self.model.fp16_enabled())

    def scaler_state(self) -> dict[str, Any] | None:
        """Return the numbers of DeepSpeed's loss scaler."""
        if not self.scales_loss:
            return None
        scaler = vars(self.optimizer.loss_scaler)
        return {name: value for name, value in scaler.items() if isinstance(value, int | float)}

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Set the numbers of DeepSpeed's loss scaler."""
        if state and self.scales_loss:
            vars(self.optimizer.loss_scaler).update(state)

    def forward_backward(self, last: bool) -> AbstractContextManager[Any]:
        """Nothing to do around a forward: the boundary is said at the backward."""
        return nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; the last one finishes their reduction."""
        # Accelerate's own backward would step at once, before its norm can be looked at.
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        self.model.backward(loss)

    def step(self, max_norm: float | None) -> Update:
        """Step; clipping was given to DeepSpeed when it started, except at stage 0."""
        if self.stage == 0:
            parameters = [p for p in self.model.module.parameters() if p.grad is not None]
            norm = float(nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")))
            finite = norm == norm and abs(norm) != float("inf")
            if not finite:
                self.model.zero_grad()
                return Update(norm, applied=False)
            self.model.step()
            return Update(norm, applied=True)
        self.model.step()
        norm = self.model.get_global_grad_norm()
        overflow = bool(getattr(self.optimizer, "overflow", False))
        return Update(float("inf") if norm is None else float(norm), applied=not overflow)
