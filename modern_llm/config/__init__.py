"""Typed configuration: pure, creates nothing on disk, imports neither torch nor accelerate."""

from modern_llm.config.data import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.config.lora import LoraConfig
from modern_llm.config.model import ModernLLMConfig, MoEConfig
from modern_llm.config.training import TrainingConfig

__all__ = [
    "DocumentDatasetConfig",
    "InstructionDatasetConfig",
    "LabelledDatasetConfig",
    "LoraConfig",
    "ModernLLMConfig",
    "MoEConfig",
    "PreferenceDatasetConfig",
    "TrainingConfig",
]
