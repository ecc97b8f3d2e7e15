"""Checkpoints as a `.pt` file: `{"config": {...}, "model_state": {...}}`, without pickled code.

`config` holds the fields of `ModernLLMConfig`; `model_state` the tensors under the names of the
stock architecture that it builds. Files are read with `weights_only=True`.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from modern_llm.config import ModernLLMConfig
from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line
from modern_llm.models.build import build_model, to_transformers_config
from modern_llm.storage.regular_files import check_regular

# Prefixes that wrappers (DDP, torch.compile) leave in the names of state dictionaries.
WRAPPERS = ("module.", "_orig_mod.", "model_state.")


def read_config(path: Path) -> PretrainedConfig:
    """Return the `transformers` configuration of a `.pt` file; its tensors are only mapped."""
    return to_transformers_config(_model_config(path, _read(path)))


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.pt` file under plain names, mapped if the format allows it."""
    return _plain_names(_read(path))


def load_model(path: Path) -> PreTrainedModel:
    """Return the model of a `.pt` file in float32; names and shapes must match exactly."""
    content = _read(path)
    model = build_model(_model_config(path, content), seed=0)
    model.load_state_dict(_checked(path, _plain_names(content), model), strict=False)
    model.tie_weights()
    return model


def checked_state(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return `read_state`, or raise `UserError` if names or shapes are not those of `model`."""
    return _checked(path, read_state(path), model)


def _checked(path: Path, state: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    expected = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    problems = [f"{name} is missing" for name in expected if name not in state and name not in tied]
    problems += [f"{name} is unknown" for name in state if name not in expected]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        raise UserError(
            f"checkpoint {path}: model_state does not fit its config: {'; '.join(problems[:5])}"
            f"{f' and {len(problems) - 5} more' if len(problems) > 5 else ''}"
        )
    return state


def save_model(path: Path, config: ModernLLMConfig, model: PreTrainedModel) -> None:
    """Write `model`, which `config` describes, as a `.pt` file."""
    torch.save({"config": dataclasses.asdict(config), "model_state": model.state_dict()}, path)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file; check the path")
    try:
        # Mapped, so that reading the configuration reads no weights. The format before torch 1.6,
        # which is not a zip archive, cannot be mapped.
        check_regular(path)
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # including the unpickler's own exceptions
        raise UserError(
            f"checkpoint {path}: not a .pt file of plain tensors ({first_line(error)}); nothing in "
            "it was executed"
        ) from error
    if not isinstance(content, dict) or not {"config", "model_state"} <= set(content):
        held = (
            sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        )
        raise UserError(f"checkpoint {path}: needs the keys config and model_state, holds {held}")
    return content


def _model_config(path: Path, content: dict[str, Any]) -> ModernLLMConfig:
    try:
        return ModernLLMConfig(**content["config"])
    except (ValueError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(
            f"checkpoint {path}: config is not a valid ModernLLMConfig: {' '.join(lines[:6])}"
        ) from error


def _plain_names(content: dict[str, Any]) -> dict[str, Tensor]:
    return {_plain_name(name): tensor for name, tensor in content["model_state"].items()}


def _plain_name(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.removeprefix(next(wrapper for wrapper in WRAPPERS if name.startswith(wrapper)))
    return name
