"""Pretraining, SFT and DPO of decoder language models, from a laptop core to a cluster.

    import modern_llm as ml
    ml.dpo("my/chat-model", "pairs.jsonl", output_dir="runs/dpo")

Everything public is here; modules are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modern_llm.api import dpo, kto, pretrain, sft
    from modern_llm.config import (
        DocumentDatasetConfig,
        InstructionDatasetConfig,
        LabelledDatasetConfig,
        LoraConfig,
        ModernLLMConfig,
        MoEConfig,
        PreferenceDatasetConfig,
        TrainingConfig,
    )
    from modern_llm.config.dpo import DPOConfig
    from modern_llm.config.errors import (
        ConfigError,
        DataError,
        NotFiniteError,
        PeerError,
        Stopped,
        StorageError,
        UserError,
    )
    from modern_llm.config.kto import KTOConfig
    from modern_llm.data.read.own_formats import register_format
    from modern_llm.models.scorer import TokenScorer
    from modern_llm.objectives.preference import preference_loss
    from modern_llm.objectives.register import register_loss
    from modern_llm.reference.store.store import ReferenceStore
    from modern_llm.setup.micro_batches import PairCollator
    from modern_llm.training.callbacks import Callback, Control, TrainState
    from modern_llm.training.train_dpo import run_dpo
    from modern_llm.training.train_kto import run_kto
    from modern_llm.training.train_lm import run_training
    from modern_llm.training.train_sft import run_sft

_MODULES = {
    "modern_llm.api": "dpo kto pretrain sft",
    "modern_llm.config": "DocumentDatasetConfig InstructionDatasetConfig LabelledDatasetConfig "
    "LoraConfig ModernLLMConfig MoEConfig PreferenceDatasetConfig TrainingConfig",
    "modern_llm.config.dpo": "DPOConfig",
    "modern_llm.config.errors": "ConfigError DataError NotFiniteError PeerError Stopped "
    "StorageError UserError",
    "modern_llm.config.kto": "KTOConfig",
    "modern_llm.models.scorer": "TokenScorer",
    "modern_llm.data.read.own_formats": "register_format",
    "modern_llm.objectives.preference": "preference_loss",
    "modern_llm.objectives.register": "register_loss",
    "modern_llm.reference.store.store": "ReferenceStore",
    "modern_llm.setup.micro_batches": "PairCollator",
    "modern_llm.training.callbacks": "Callback Control TrainState",
    "modern_llm.training.train_dpo": "run_dpo",
    "modern_llm.training.train_kto": "run_kto",
    "modern_llm.training.train_lm": "run_training",
    "modern_llm.training.train_sft": "run_sft",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = [
    "Callback",
    "ConfigError",
    "Control",
    "DPOConfig",
    "DataError",
    "DocumentDatasetConfig",
    "InstructionDatasetConfig",
    "KTOConfig",
    "LabelledDatasetConfig",
    "LoraConfig",
    "MoEConfig",
    "ModernLLMConfig",
    "NotFiniteError",
    "PairCollator",
    "PeerError",
    "PreferenceDatasetConfig",
    "ReferenceStore",
    "Stopped",
    "StorageError",
    "TokenScorer",
    "TrainState",
    "TrainingConfig",
    "UserError",
    "dpo",
    "kto",
    "preference_loss",
    "pretrain",
    "register_format",
    "register_loss",
    "run_dpo",
    "run_kto",
    "run_sft",
    "run_training",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("modern-llm")
        except PackageNotFoundError:  # a copy of the source that is not installed
            return "unknown"
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
