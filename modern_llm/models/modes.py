"""Make the training mode of a model compute the same function as its evaluation mode.

The reference is scored in evaluation mode and the policy trains in training mode: both must be the
same function. `disable_dropout` switches dropout off. Other differences between the modes (router
noise, skipped layers, an expert's capacity) are measured here, and modules with one stay in one
mode. Modules that change weights in place in evaluation mode (RWKV) are measured too, because the
changed weights would be saved.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config.printable import first_line
from modern_llm.models.routers import without_router_loss
from modern_llm.models.training_mode import disable_dropout, dropouts

log = logging.getLogger(__name__)

# Tensors up to this size (statistics, clips) are restored if a trial changed them.
SMALL = 1 << 16


def settle(asked: list[tuple[PreTrainedModel, int, float]], *, dropout: bool) -> list[str]:
    """Keep modules in one mode if their modes compute different functions; return log lines.

    Args:
        asked: the model and its twin, each with the tokens of a row and the largest difference of a
            log-prob by rounding.
        dropout: the run trains with dropout, so that differences in training mode are kept.
    """
    notes, models = [], [model for model, _, _ in asked]
    trials = [_Trial(*each) for each in asked]
    changing = _classes(trials, _Trial.changes_weights, training=False)
    if changing:
        hold(models, changing, training=True)
        notes.append(
            f"{_names(changing)}: stays in training mode, because its evaluation mode changes "
            "weights in place"
        )
    with _without_dropout(models) if dropout else nullcontext():
        if not dropout:
            for model in models:
                disable_dropout(model)
        differing = _classes(trials, _Trial.why_training_differs, training=True)
    if differing and dropout:
        notes.append(
            f"{_names(differing)}: {_reason(differing)} in training mode; that is kept, as it is "
            "with dropout"
        )
    elif differing:
        hold(models, differing, training=False)
        notes.append(
            f"{_names(differing)}: stays in evaluation mode, because it {_reason(differing)} in "
            "training mode"
        )
    for model in models:
        model.eval()
    return notes


class _Trial:
    """Comparison of one model in both modes."""

    def __init__(self, model: PreTrainedModel, length: int, tolerance: float):
        self.model, self._tolerance = model, tolerance
        rows = model.get_input_embeddings().weight.shape[0]
        self._ids = (torch.arange(3, 3 + length) % rows)[None].to(model.device)
        self._expected: Tensor | None = None

    def changes_weights(self, modules: Iterable[nn.Module]) -> str:
        """Return "changes weights" if a forward with only these modules in evaluation mode writes
        to weights, else "". The next forward in training mode restores them."""
        self.model.train()
        for module in modules:
            module.training = False
        before = [p._version for p in self.model.parameters()]
        self._forward()
        if before == [p._version for p in self.model.parameters()]:
            return ""
        self.model.train()
        self._forward()
        return "changes weights"

    def why_training_differs(self, modules: Iterable[nn.Module]) -> str:
        """Return how a forward with these modules in training mode differs from one in evaluation
        mode, or ""."""
        self.model.eval()
        if self._expected is None:
            self._expected, self._draws = self._forward()
        for module in modules:
            module.training = True
        try:
            with _restored(self.model):
                found, draws = self._forward()
        except Exception as error:  # the model's code may raise anything
            return f"fails ({first_line(error)})"
        finally:
            self.model.eval()
        if draws and not self._draws:
            return "draws random numbers"
        worst = float((found - self._expected).abs().max())
        return "" if worst <= self._tolerance else f"differs by {worst:.2g} nats a token"

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, bool]:
        """Return the log-softmax of a row, and whether the forward drew random numbers."""
        model = self.model
        with _own_generators(model.device) as drawn:
            output = model(input_ids=self._ids, use_cache=False, **without_router_loss(model))
            logits = output.logits[0].float()
            return logits.log_softmax(-1), drawn()


def _classes(trials: list[_Trial], why, *, training: bool) -> dict[type, str]:  # noqa: ANN001
    """Return the classes of modules for which `why` gives a reason, with the reason.

    All classes, if no single class explains the difference.
    """
    found: dict[type, str] = {}
    for trial in trials:
        try:
            modules = list(trial.model.modules())
            reason = why(trial, modules)
            if not reason:
                continue
            alone = {}
            for kind in dict.fromkeys(map(type, modules)):
                answer = why(trial, [m for m in modules if type(m) is kind])
                alone |= {kind: answer} if answer else {}
            rest = why(trial, [m for m in modules if type(m) not in alone])
            found |= dict.fromkeys(map(type, modules), reason) if rest or not alone else alone
        except Exception as error:  # the model's code may raise anything
            log.debug("%s: %s", type(trial.model).__name__, error)
    return found


def hold(models: list[PreTrainedModel], kinds: Iterable[type], *, training: bool) -> None:
    """Keep the modules of these classes in one mode."""
    for module in (m for model in models for m in model.modules() if type(m) in kinds):
        module.training = training
        module.train = MethodType(_train_children, module)


def held(model: nn.Module, *, training: bool) -> set[type]:
    """Return the classes of modules that `hold` keeps in this mode."""
    return {
        type(module)
        for module in model.modules()
        if getattr(vars(module).get("train"), "__func__", None) is _train_children
        and module.training == training
    }


def _train_children(module: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `train` of a module that keeps its mode; its submodules still change theirs."""
    for child in module.children():
        child.train(mode)
    return module


def _names(found: dict[type, str]) -> str:
    names = sorted({kind.__name__ for kind in found})
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _reason(found: dict[type, str]) -> str:
    return next(iter(found.values()))


@contextmanager
def _without_dropout(models: list[PreTrainedModel]) -> Iterator[None]:
    """Switch dropout off inside the `with` block."""
    kept = [(m, name, getattr(m, name)) for model in models for m, name in dropouts(model)]
    for module, name, _ in kept:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore the small tensors of the model that a forward changes."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.numel() <= SMALL]
    kept = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


@contextmanager
def _own_generators(device: torch.device) -> Iterator:
    """Yield a function that returns whether random numbers were drawn; restore all generators."""

    def state() -> list[object]:
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [random.getstate(), *(t.numpy().tobytes() for t in (torch.get_rng_state(), *cuda))]

    python = random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        before = state()
        try:
            yield lambda: state() != before
        finally:
            random.setstate(python)
