"""The verbs of the three stages: `pretrain`, `sft`, `dpo`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modern_llm.config.errors import ConfigError
from modern_llm.verbs.stage_settings import (
    DpoSettings,
    PretrainSettings,
    SftSettings,
    TrainingSettings,
    training_config,
)
from modern_llm.verbs.sweep import run_sweep

if TYPE_CHECKING:
    from modern_llm.training.run.dry_run import DryRun


def pretrain(settings: PretrainSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    return _stage(settings, _pretrain)


def sft(settings: SftSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    return _stage(settings, _sft)


def dpo(settings: DpoSettings) -> dict[str, Any]:
    """Run the stage; return its final folder."""
    return _stage(settings, _dpo)


def _pretrain(settings: PretrainSettings, dry_run: DryRun | None = None) -> Path:
    from modern_llm.training.train_lm import run_training

    return run_training(
        settings.model,
        training_config(settings),
        settings.data,
        settings.tokenizer_name,
        dry_run=dry_run,
    )


def _sft(settings: SftSettings, dry_run: DryRun | None = None) -> Path:
    from modern_llm.training.train_sft import run_sft

    return run_sft(
        settings.pretrain_checkpoint,
        training_config(settings),
        settings.data,
        settings.tokenizer_name,
        dry_run=dry_run,
        lora_config=settings.lora,
    )


def _dpo(settings: DpoSettings, dry_run: DryRun | None = None) -> Path:
    from modern_llm.training.train_dpo import run_dpo

    return run_dpo(
        settings.sft_checkpoint,
        training_config(settings),
        settings.dpo,
        settings.data,
        settings.tokenizer_name,
        dry_run=dry_run,
        lora_config=settings.lora,
    )


def _stage(settings: TrainingSettings, run: Callable[..., Path]) -> dict[str, Any]:
    """Run, try, or run once for every value of a sweep."""
    if settings.sweep is not None:
        if settings.dry_run:
            raise ConfigError(["dry_run and sweep exclude each other: try one run at a time"])
        return run_sweep(settings, run)
    if settings.dry_run and settings.profile:
        raise ConfigError(["profile has no effect beside dry_run, which makes no step: remove one"])
    if settings.dry_run:
        return _try(settings, run)
    return {"final": str(run(settings))}


def _try(settings: TrainingSettings, run: Callable[..., Path]) -> dict[str, Any]:
    import os

    from modern_llm.training.run.dry_run import DryRun, contradictions
    from modern_llm.verbs.terminal import show_dry_run

    checkpoint = getattr(settings, "sft_checkpoint", getattr(settings, "pretrain_checkpoint", None))
    data = settings.data  # type: ignore[attr-defined]
    problems = contradictions(
        training_config(settings),
        data,
        checkpoint=checkpoint,
        tokenizer=settings.tokenizer_name,
        max_length=_max_length(settings),
    )
    if problems:
        raise ConfigError(problems)
    trial = DryRun()
    with trial.cleaned_up():
        run(settings, dry_run=trial)
    if os.environ.get("RANK", "0") == "0" and not settings.json_output:
        show_dry_run(trial.result)
    return trial.result


def _max_length(settings: TrainingSettings) -> int | None:
    if isinstance(settings, DpoSettings):
        return settings.dpo.max_length
    return settings.data.max_length if isinstance(settings, SftSettings) else None
