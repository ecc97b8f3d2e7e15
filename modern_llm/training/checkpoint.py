"""Weights and optimizer moments as safetensors in a committed folder; the newest that verifies
counts.

Holds everything that a run needs to go on: order, rate and random draws are functions of the step,
so
the position is one integer. Nothing is pickled. Called by the loop.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modern_llm.config.errors import StorageError
from modern_llm.distributed.commit import committed_folder, verified_manifest

log = logging.getLogger(__name__)

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    facts: dict[str, Any],
) -> None:
    """Commit `folder/step-XXXXXXXX` with the state after optimizer step `step`."""
    with committed_folder(folder / f"step-{step:08d}", {**facts, "step": step}) as place:
        save_file(_tensors(model), place / WEIGHTS)
        save_file(_moments(model, optimizer), place / MOMENTS)
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        (place / STATE).write_text(json.dumps({"step": step, "scaler": scaler}))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that verifies and its facts, or None where there is none at all.

    Raises:
        StorageError: checkpoints stand here and none is intact; the run must not start over by
        itself.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for place in found:
        try:
            return place, verified_manifest(place)
        except StorageError as error:
            log.warning("checkpoint %s is damaged and passed over: %s", place.name, error)
    if found:
        raise StorageError(
            f"{folder}: none of {len(found)} checkpoints is intact; remove them to start over"
        )
    return None


def load(
    place: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> None:
    """Read a checkpoint that `newest` verified into `model` and `optimizer`."""
    _copy(place / WEIGHTS, _tensors(model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    shapes = {
        f"{moment}/{name}": p for p, name in names.items() for moment in ("exp_avg", "exp_avg_sq")
    }
    loaded = _read(place / MOMENTS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            if f"step/{name}" not in loaded:
                continue  # it never had a gradient: AdamW keeps nothing for such a parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                _must_match(place / MOMENTS, f"{moment}/{name}", loaded, shapes[f"{moment}/{name}"])
            optimizer.state[parameter] = {
                "step": loaded[f"step/{name}"].to(parameter.device),
                "exp_avg": loaded[f"exp_avg/{name}"].to(parameter),
                "exp_avg_sq": loaded[f"exp_avg_sq/{name}"].to(parameter),
            }
    scaler = json.loads((place / STATE).read_text())["scaler"]
    if accelerator.scaler and scaler:
        accelerator.scaler.load_state_dict(scaler)


def retire(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and whatever a killed save left behind."""
    for place in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(place, ignore_errors=True)
    for place in folder.glob(".tmp-*"):
        shutil.rmtree(place, ignore_errors=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that belong to the state."""
    persistent = model.state_dict(keep_vars=True)
    tensors = dict(model.named_parameters())
    tensors |= {n: b for n, b in model.named_buffers() if n in persistent}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: cannot be read ({error})") from error


def _copy(path: Path, into: dict[str, Tensor]) -> None:
    loaded = _read(path)
    if set(loaded) != set(into):
        raise StorageError(
            f"{path}: holds other tensors than the model: {sorted(set(loaded) ^ set(into))[:4]}"
        )
    for name, tensor in into.items():
        _must_match(path, name, loaded, tensor)
        tensor.copy_(loaded[name])


def _must_match(path: Path, name: str, loaded: dict[str, Tensor], expected: Tensor) -> None:
    found = loaded.get(name)
    if found is None or found.shape != expected.shape or found.dtype != expected.dtype:
        seen = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise StorageError(
            f"{path}: {name} is {seen}, expected {tuple(expected.shape)} {expected.dtype}"
        )
