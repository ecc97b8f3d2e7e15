"""Settings of the verbs `pretrain`, `sft` and `dpo`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from pydantic import Field

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.data import DatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.verbs.settings import Settings


class TrainingSettings(Settings):
    """Shared by the three stages; each adds the section `data` of its kind."""

    train: TrainingConfig
    data: DatasetConfig
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the checkpoint's own."""
    resume: bool = False
    """Resume the run in output_dir, and refuse to start where there is none."""
    accept_change: bool = False
    """Resume although settings differ that may (--accept-change does the same); each difference is
    printed."""
    profile: Annotated[int, Field(gt=0)] | None = None
    """Trace this many steps with torch.profiler into output_dir and print the largest costs."""
    dry_run: bool = False
    """Resolve everything, build the first batch, go once forward and backward, keep nothing
    (--dry-run does the same)."""
    sweep: str | None = None
    """Run once for every value, e.g. `dpo.beta=0.05,0.1,0.3`; several options, with a space between
    them, make a grid. Each run has a folder of its own in output_dir, beside one report of all."""


class PretrainSettings(TrainingSettings):
    """Pretrain a new model on documents."""

    model: ModernLLMConfig
    data: DocumentDatasetConfig = Field(default_factory=DocumentDatasetConfig)


class SftSettings(TrainingSettings):
    """Fine-tune a checkpoint on instructions."""

    pretrain_checkpoint: str
    """Checkpoint to start from: Hub id, transformers folder, .pt file, or a run's checkpoint
    (RUN/checkpoints/step-00000500, or RUN/last)."""
    data: InstructionDatasetConfig = Field(default_factory=InstructionDatasetConfig)
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights."""


class DpoSettings(TrainingSettings):
    """Train a policy on preference pairs against a frozen reference, which is scored once."""

    sft_checkpoint: str
    """The policy's start and the reference: Hub id, transformers folder, .pt file, or a run's
    checkpoint (RUN/checkpoints/step-00000500, or RUN/last)."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    data: PreferenceDatasetConfig = Field(default_factory=PreferenceDatasetConfig)
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights; the reference is the model without them."""


def training_config(settings: TrainingSettings) -> TrainingConfig:
    """Return the section `train`, with what `--resume` and similar options set."""
    asked: dict[str, Any] = {"resume": "must"} if settings.resume else {}
    if settings.accept_change:
        asked["accept_change"] = True
    if settings.profile:
        asked["profile_steps"] = settings.profile
    return dataclasses.replace(settings.train, **asked)
