"""`dpo`, `kto`, `sft` and `pretrain`: a stage in one call, with every option as a keyword.

    import modern_llm as ml
    ml.dpo("my/chat-model", rows, output_dir="runs/dpo", beta=0.1, learning_rate=5e-6)

Each keyword goes to the configuration section that has an option of this name; `run_dpo` and its
siblings take the sections themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError, close_to
from modern_llm.config.foreign import meaning_here
from modern_llm.config.kto import KTOConfig
from modern_llm.distributed.notebook import one_line_errors

BY_ARGUMENT = {
    "dataset_name": "data",
    "eval_dataset_name": "eval_data",
    "tokenizer_name": "tokenizer",
}
"""Options that the functions take as objects too, under shorter names."""


@one_line_errors()
def dpo(
    model: Any,
    data: Any,
    *,
    output_dir: str | Path,
    tokenizer: Any = None,
    eval_data: Any = None,
    lora: LoraConfig | dict[str, Any] | bool = False,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Path:
    """Train a model on preference pairs with DPO or a loss of its family; return its final folder.

    Args:
        model: Hub id, folder, `.pt` file, a run's checkpoint, or a `PreTrainedModel`; also the
            frozen reference.
        data: Hub id, file or folder, list of dicts, `datasets.Dataset` or pandas frame.
        output_dir: the run folder; the same call resumes a run in it.
        tokenizer: name or object; by default the model's own.
        eval_data: held-out pairs, in any form that `data` has.
        lora: train adapters: True, options of `LoraConfig`, or one.
        callbacks: your own code in the loop: objects of `Callback` or `TrainerCallback`.
        options: any option of `TrainingConfig`, `DPOConfig` and `PreferenceDatasetConfig`.

    Raises:
        ConfigError: options do not exist, or values of a section are refused.
        UserError, StorageError, Stopped: as in `run_dpo`.
    """
    from modern_llm.training.train_dpo import run_dpo

    schemas = (TrainingConfig, DPOConfig, PreferenceDatasetConfig)
    train, loss, section = _sections("dpo", schemas, output_dir, data, eval_data, options)
    return run_dpo(
        model, train, loss, section, tokenizer, lora_config=_lora(lora), callbacks=callbacks
    )


@one_line_errors()
def kto(
    model: Any,
    data: Any,
    *,
    output_dir: str | Path,
    tokenizer: Any = None,
    eval_data: Any = None,
    lora: LoraConfig | dict[str, Any] | bool = False,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Path:
    """Train a model with KTO on responses labelled desirable or not; return its final folder.

    Args:
        options: any option of `TrainingConfig`, `KTOConfig` and `LabelledDatasetConfig`; the other
            arguments and errors are those of `dpo`.
    """
    from modern_llm.training.train_kto import run_kto

    schemas = (TrainingConfig, KTOConfig, LabelledDatasetConfig)
    train, loss, section = _sections("kto", schemas, output_dir, data, eval_data, options)
    return run_kto(
        model, train, loss, section, tokenizer, lora_config=_lora(lora), callbacks=callbacks
    )


@one_line_errors()
def sft(
    model: Any,
    data: Any,
    *,
    output_dir: str | Path,
    tokenizer: Any = None,
    eval_data: Any = None,
    lora: LoraConfig | dict[str, Any] | bool = False,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Path:
    """Fine-tune a model on instructions or conversations; return its final folder.

    Args:
        options: any option of `TrainingConfig` and `InstructionDatasetConfig`; the other arguments
            and errors are those of `dpo`.
    """
    from modern_llm.training.train_sft import run_sft

    schemas = (TrainingConfig, InstructionDatasetConfig)
    train, section = _sections("sft", schemas, output_dir, data, eval_data, options)
    return run_sft(model, train, section, tokenizer, lora_config=_lora(lora), callbacks=callbacks)


@one_line_errors()
def pretrain(
    model: ModernLLMConfig | dict[str, Any],
    data: Any,
    *,
    output_dir: str | Path,
    tokenizer: Any,
    eval_data: Any = None,
    callbacks: Sequence[Any] = (),
    **options: Any,
) -> Path:
    """Train a new model on documents; return its final folder.

    Args:
        model: its shape, a `ModernLLMConfig` or its options.
        options: any option of `TrainingConfig` and `DocumentDatasetConfig`; the other arguments
            and errors are those of `dpo`.
    """
    from modern_llm.training.train_lm import run_training

    shape = model if isinstance(model, ModernLLMConfig) else _built(ModernLLMConfig, model)
    schemas = (TrainingConfig, DocumentDatasetConfig)
    train, section = _sections("pretrain", schemas, output_dir, data, eval_data, options)
    return run_training(shape, train, section, tokenizer, callbacks=callbacks)


def _sections(
    stage: str,
    schemas: tuple[Any, ...],
    output_dir: str | Path,
    data: Any,
    eval_data: Any,
    options: dict[str, Any],
) -> list[Any]:
    """Return one section of each class, the last one for the data, made of the options."""
    given = {"run_name": stage, **options, "output_dir": output_dir}
    names = [{field.name for field in dataclasses.fields(schema)} for schema in schemas]
    known = sorted(set().union(*names) - set(BY_ARGUMENT))
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError([_unknown(stage, name, known) for name in unknown])
    sections = [
        _built(schema, {name: value for name, value in given.items() if name in own})
        for schema, own in zip(schemas, names, strict=True)
    ]
    from modern_llm.training.from_memory import data_name

    train, changes = sections[0], {}
    if isinstance(data, schemas[-1]):
        if extra := [name for name in options if name in names[-1]]:
            raise ConfigError([f"{name}: set it in the section given as data" for name in extra])
        sections[-1] = data
    else:
        changes["dataset_name"] = data_name(data, train)
    if eval_data is not None:
        changes["eval_dataset_name"] = data_name(eval_data, train)
    sections[-1] = _built(partial(dataclasses.replace, sections[-1]), changes)
    return sections


def _unknown(stage: str, name: str, known: list[str]) -> str:
    if name in BY_ARGUMENT:
        return f"{stage}: {name} is given as {BY_ARGUMENT[name]}="
    return f"{stage}: {name} is not an option{meaning_here(name, known) or close_to(name, known)}"


def _built(schema: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Return the section of these values; what it refuses becomes one error of this package."""
    from pydantic import ValidationError

    try:
        return schema(**values)
    except ValidationError as error:
        problems = []
        for entry in error.errors(include_url=False):
            name = ".".join(map(str, entry["loc"]))
            text = entry["msg"].removeprefix("Value error, ")
            problems.append(f"{name}: {text}, got {entry['input']!r:.80}" if name else text)
        raise ConfigError(problems) from error


def _lora(lora: LoraConfig | dict[str, Any] | bool) -> LoraConfig | None:
    if isinstance(lora, LoraConfig):
        return lora
    if isinstance(lora, dict):
        return _built(LoraConfig, lora)
    return LoraConfig() if lora else None
