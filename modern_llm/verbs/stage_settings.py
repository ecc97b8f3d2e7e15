"""Settings of the verbs `pretrain`, `sft`, `dpo` and `kto`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

from pydantic import Field

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.data import DatasetConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.kto import KTOConfig
from modern_llm.verbs.settings import Settings

OFTEN = frozenset(
    [
        *(
            f"train.{name}"
            for name in (
                "run_name", "output_dir", "dataset_name", "batch_size", "micro_batch_size",
                "max_steps", "epochs", "learning_rate", "warmup_steps", "warmup_ratio",
                "schedule", "seed",
                "mixed_precision", "gradient_checkpointing", "log_every", "eval_every",
                "save_every",
            )
        ),
        *(
            f"data.{name}"
            for name in (
                "dataset_name", "split", "columns", "eval_split", "eval_dataset_name",
                "eval_fraction", "template", "format", "max_length", "max_examples",
            )
        ),
        *(f"dpo.{name}" for name in ("beta", "loss_type", "max_length", "reference")),
        *(f"kto.{name}" for name in ("beta", "desirable_weight", "undesirable_weight",
                                     "max_length", "reference")),
        *(f"lora.{name}" for name in ("rank", "alpha", "targets", "quantize")),
        *(
            f"model.{name}"
            for name in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len")
        ),
    ]
)  # fmt: skip


class TrainingSettings(Settings):
    """Shared by all stages; each adds the section `data` of its kind."""

    often: ClassVar[frozenset[str]] = OFTEN

    train: TrainingConfig
    data: DatasetConfig
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the checkpoint's own."""
    plugins: list[str] = Field(default_factory=list)
    """Modules to import first, on every process: package.module,package.other. They register losses
    and formats of your own."""
    resume: bool = False
    """Resume the run in output_dir, and refuse to start where there is none; by default a run that
    is there is resumed. train.resume in a file: auto, must or never."""
    accept_change: bool = False
    """Resume although settings differ that may; each difference is printed."""
    profile: Annotated[int, Field(gt=0)] | None = None
    """Trace this many steps with torch.profiler into output_dir and print the largest costs."""
    dry_run: bool = False
    """Resolve everything, build the first batch, go once forward and backward, keep nothing."""
    sweep: str | None = None
    """Run once for every value, e.g. `dpo.beta=0.05,0.1,0.3`; several options, with a space between
    them, make a grid. Each run has a folder of its own in output_dir, beside one report of all."""


class PretrainSettings(TrainingSettings):
    """Pretrain a new model on documents."""

    example: ClassVar[str] = "modern-llm pretrain run.yaml --data docs.jsonl --train.max_steps 1000"

    model: ModernLLMConfig
    data: DocumentDatasetConfig = Field(default_factory=DocumentDatasetConfig)


class SftSettings(TrainingSettings):
    """Fine-tune a checkpoint on instructions."""

    example: ClassVar[str] = "modern-llm sft run.yaml --pretrain_checkpoint runs/base/last"

    pretrain_checkpoint: str
    """Checkpoint to start from: Hub id, transformers folder, .pt file, or a run's checkpoint
    (RUN/checkpoints/step-00000500, RUN/last or RUN/best)."""
    data: InstructionDatasetConfig = Field(default_factory=InstructionDatasetConfig)
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights."""


class DpoSettings(TrainingSettings):
    """Train a policy on preference pairs against a frozen reference, which is scored once."""

    example: ClassVar[str] = "modern-llm dpo run.yaml --sft_checkpoint runs/sft/last --dpo.beta 0.1"

    sft_checkpoint: str
    """The policy's start and the reference: Hub id, transformers folder, .pt file, or a run's
    checkpoint (RUN/checkpoints/step-00000500, RUN/last or RUN/best)."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    data: PreferenceDatasetConfig = Field(default_factory=PreferenceDatasetConfig)
    lora: LoraConfig | None = None
    """Train adapters beside frozen weights; the reference is the model without them."""


class KtoSettings(TrainingSettings):
    """Train a policy on single responses that are labelled desirable or undesirable (KTO)."""

    example: ClassVar[str] = "modern-llm kto run.yaml --sft_checkpoint runs/sft/last --kto.beta 0.1"

    sft_checkpoint: str
    """The policy's start and the reference: Hub id, transformers folder, .pt file, or a run's
    checkpoint (RUN/checkpoints/step-00000500, RUN/last or RUN/best)."""
    kto: KTOConfig = Field(default_factory=KTOConfig)
    data: LabelledDatasetConfig = Field(default_factory=LabelledDatasetConfig)
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
