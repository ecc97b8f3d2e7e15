"""Which settings may differ when a run is resumed, and what each difference costs.

Every option carries its class (`config.base.OnResume`). A run folder is resumed under other
settings only as their classes allow; each difference is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
from modern_llm.config.base import OnResume, resume_class
from modern_llm.config.data import MixtureSource
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.kto import KTOConfig

SECTIONS: dict[str, tuple[Any, ...]] = {
    "train": (TrainingConfig,),
    "data": (
        PreferenceDatasetConfig,
        InstructionDatasetConfig,
        LabelledDatasetConfig,
        DocumentDatasetConfig,
    ),
    "data.sources": (MixtureSource,),
    "dpo": (DPOConfig,),
    "kto": (KTOConfig,),
    "lora": (LoraConfig,),
    "model": (ModernLLMConfig,),
    "model.moe_config": (MoEConfig,),
}
"""Dotted name in `config.yaml` -> the classes that a section of this name may have."""
ARGUMENTS = ("pretrain_checkpoint", "sft_checkpoint", "tokenizer_name")
"""Names in `config.yaml` outside all sections: a change must keep the content that they name."""


@dataclass(frozen=True)
class Change:
    """One setting that differs."""

    name: str
    """Dotted, e.g. `train.learning_rate`."""
    old: Any
    new: Any
    kind: OnResume

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r} ({self.kind.value})"


def class_of(name: str) -> OnResume:
    """Return the class of a dotted setting; an unknown one may not change."""
    if name in ARGUMENTS:
        return OnResume.CONTENT
    if name == "plugins":  # what they register is named by other options
        return OnResume.FREE
    section, _, field = name.rpartition(".")
    for schema in SECTIONS.get(section, ()):
        if field in schema.__pydantic_fields__:
            return resume_class(schema, field)
    return OnResume.FORBIDDEN


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    """Yield every setting that differs between two configurations in plain values.

    Sections are compared field by field; one that only one side has differs as a whole. An option
    that `before` lacks had its default: a version without the option wrote it.
    """
    defaults = _defaults(prefix[:-1], now)
    for key in sorted(set(before) | set(now)):
        name = f"{prefix}{key}"
        old, new = before.get(key, defaults.get(key)), now.get(key)
        if name == "data.sources" and new and isinstance(old, list):
            filled = _defaults(name, new[0])
            old = [filled | item if isinstance(item, dict) else item for item in old]
        if isinstance(old, dict) and isinstance(new, dict) and name in SECTIONS:
            yield from changes(old, new, f"{name}.")
        elif old != new:
            yield Change(name, old, new, class_of(name))


def changed_options(record: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the options whose value is not their default."""
    defaults, found = _defaults(prefix[:-1], record), []
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in SECTIONS:
            found += changed_options(value, f"{name}.")
        elif key in defaults and value != defaults[key]:
            found.append(name)
    return found


def _defaults(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of a section's options; its keys tell which class it has."""
    for schema in SECTIONS.get(name, ()):
        if set(schema.__pydantic_fields__) == set(section):
            return {
                option: field.get_default(call_default_factory=True)
                for option, field in schema.__pydantic_fields__.items()
                if not field.is_required()
            }
    return {}
