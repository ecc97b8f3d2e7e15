"""The stages of training as verbs: one row of `STAGES` each.

A new stage is a `training/train_*.py`, a task, its settings and a row here: the command line,
`inspect`, `plan`, `doctor`, `--dry-run` and `--sweep` read the rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modern_llm.config.errors import ConfigError
from modern_llm.verbs.settings import read_settings, sections_of
from modern_llm.verbs.stage_settings import (
    DpoSettings,
    KtoSettings,
    PretrainSettings,
    SftSettings,
    TrainingSettings,
    training_config,
)
from modern_llm.verbs.sweep import run_sweep

if TYPE_CHECKING:
    from modern_llm.training.run.dry_run import DryRun


@dataclass(frozen=True)
class StageSpec:
    """What the verbs know of one stage."""

    name: str
    settings: type[TrainingSettings]
    marks: frozenset[str]
    """Names in a configuration file by which it is for this stage."""
    run: Callable[..., Path]
    """(settings, dry_run=None) -> folder of the final model."""
    checkpoint: Callable[[Any], str | None]
    """Settings -> the checkpoint to start from; None for a new model."""
    lengths: Callable[[Any], tuple[int | None, int | None]]
    """Settings -> `max_length` and `max_prompt_length`, None where they are not set."""
    responses: int = 1
    """Responses of one example: their tokens are in one row with the prompt's."""
    unless: frozenset[str] = frozenset()
    """Names in a file that make it one of another stage in spite of the marks."""

    def verb(self, settings: TrainingSettings) -> dict[str, Any]:
        """Run the stage, try its first step, or run it once for every value of a sweep."""
        if settings.sweep is not None:
            if settings.dry_run:
                raise ConfigError(["dry_run and sweep exclude each other: try one run at a time"])
            return run_sweep(settings, self.run)
        if settings.dry_run and settings.profile:
            raise ConfigError(
                ["profile has no effect beside dry_run, which makes no step: remove one"]
            )
        return self._try(settings) if settings.dry_run else {"final": str(self.run(settings))}

    def _try(self, settings: TrainingSettings) -> dict[str, Any]:
        from modern_llm.training.run.dry_run import DryRun, contradictions
        from modern_llm.verbs.terminal import show_dry_run

        problems = contradictions(
            training_config(settings),
            settings.data,
            checkpoint=self.checkpoint(settings),
            tokenizer=settings.tokenizer_name,
            max_length=None if self.checkpoint(settings) is None else self.lengths(settings)[0],
        )
        if problems:
            raise ConfigError(problems)
        trial = DryRun()
        with trial.cleaned_up():
            self.run(settings, dry_run=trial)
        if os.environ.get("RANK", "0") == "0" and not settings.json_output:
            show_dry_run(trial.result)
        return trial.result


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


def _kto(settings: KtoSettings, dry_run: DryRun | None = None) -> Path:
    from modern_llm.training.train_kto import run_kto

    return run_kto(
        settings.sft_checkpoint,
        training_config(settings),
        settings.kto,
        settings.data,
        settings.tokenizer_name,
        dry_run=dry_run,
        lora_config=settings.lora,
    )


STAGES = (
    StageSpec(
        name="pretrain",
        settings=PretrainSettings,
        marks=frozenset({"model"}),
        run=_pretrain,
        checkpoint=lambda settings: None,
        lengths=lambda settings: (settings.model.max_seq_len, None),
    ),
    StageSpec(
        name="sft",
        settings=SftSettings,
        marks=frozenset({"pretrain_checkpoint"}),
        run=_sft,
        checkpoint=lambda settings: settings.pretrain_checkpoint,
        lengths=lambda settings: (settings.data.max_length, settings.data.max_prompt_length),
    ),
    StageSpec(
        name="dpo",
        settings=DpoSettings,
        marks=frozenset({"sft_checkpoint", "dpo"}),
        run=_dpo,
        checkpoint=lambda settings: settings.sft_checkpoint,
        lengths=lambda settings: (settings.dpo.max_length, settings.dpo.max_prompt_length),
        responses=2,
        unless=frozenset({"kto"}),
    ),
    StageSpec(
        name="kto",
        settings=KtoSettings,
        marks=frozenset({"kto"}),
        run=_kto,
        checkpoint=lambda settings: settings.sft_checkpoint,
        lengths=lambda settings: (settings.kto.max_length, settings.kto.max_prompt_length),
    ),
)


def read_stage(
    path: Path, overrides: list[str] | None = None
) -> tuple[StageSpec, TrainingSettings]:
    """Return the stage that a configuration file is for, and its settings.

    Raises:
        ConfigError: it fits no stage or several, or an option is wrong.
    """
    names = set(sections_of(path))
    found = [stage for stage in STAGES if names & stage.marks and not names & stage.unless]
    if len(found) != 1:
        marks = ", ".join(f"{'/'.join(sorted(stage.marks))} ({stage.name})" for stage in STAGES)
        raise ConfigError([f"{path}: the stage shows by one of {marks}; found {sorted(names)}"])
    (stage,) = found
    arguments = ["--config", str(path), *(overrides or [])]
    return stage, read_settings(stage.settings, arguments, stage.name)
