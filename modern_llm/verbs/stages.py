"""The verbs of the three stages: `pretrain`, `sft`, `dpo`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pydantic import Field

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import ConfigError
from modern_llm.config.files import Settings, read_settings, sections_of
from modern_llm.training.dpo_config import DPOConfig


class TrainingSettings(Settings):
    """Shared by the three stages."""

    train: TrainingConfig
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the checkpoint's own."""
    resume: bool = False
    """Go on with the run in output_dir, and refuse to start where there is none."""


class PretrainSettings(TrainingSettings):
    """Pretrain a new model on documents."""

    model: ModernLLMConfig
    data: DocumentDatasetConfig = Field(default_factory=DocumentDatasetConfig)


class SftSettings(TrainingSettings):
    """Fine-tune a checkpoint on instructions."""

    pretrain_checkpoint: str
    """Hub id, transformers folder or .pt file to start from."""
    data: InstructionDatasetConfig = Field(default_factory=InstructionDatasetConfig)


class DpoSettings(TrainingSettings):
    """Train a policy on preference pairs against a frozen reference, which is scored once."""

    sft_checkpoint: str
    """Hub id, transformers folder or .pt file: the policy's start and the reference."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    data: PreferenceDatasetConfig = Field(default_factory=PreferenceDatasetConfig)


def read_stage(path: Path, overrides: list[str] | None = None) -> tuple[str, TrainingSettings]:
    """Return which stage a configuration file is of, and its settings.

    Raises:
        ConfigError: it is of none, or of a wrong form.
    """
    names = set(sections_of(path))
    found = [stage for stage, (mark, _) in MARKS.items() if names & mark]
    if len(found) != 1:
        marks = ", ".join(f"{'/'.join(sorted(mark))} ({s})" for s, (mark, _) in MARKS.items())
        raise ConfigError([f"{path}: the stage shows by one of {marks}; found {sorted(names)}"])
    schema = MARKS[found[0]][1]
    return found[0], read_settings(schema, ["--config", str(path), *(overrides or [])], found[0])


# stage -> (the names in a file that only it has, its settings)
MARKS: dict[str, tuple[set[str], type[TrainingSettings]]] = {
    "pretrain": ({"model"}, PretrainSettings),
    "sft": ({"pretrain_checkpoint"}, SftSettings),
    "dpo": ({"sft_checkpoint", "dpo"}, DpoSettings),
}


def training_config(settings: TrainingSettings) -> TrainingConfig:
    """Return the section `train`, with what `--resume` asks for."""
    return dataclasses.replace(settings.train, resume="must") if settings.resume else settings.train


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    from modern_llm.training.train_lm import run_training

    folder = run_training(
        settings.model, training_config(settings), settings.data, settings.tokenizer_name
    )
    return {"final": str(folder)}


def sft(settings: SftSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    from modern_llm.training.train_sft import run_sft

    folder = run_sft(
        settings.pretrain_checkpoint,
        training_config(settings),
        settings.data,
        settings.tokenizer_name,
    )
    return {"final": str(folder)}


def dpo(settings: DpoSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    from modern_llm.training.train_dpo import run_dpo

    folder = run_dpo(
        settings.sft_checkpoint,
        training_config(settings),
        settings.dpo,
        settings.data,
        settings.tokenizer_name,
    )
    return {"final": str(folder)}
