"""The verb `inspect`: what a data section holds, before a run; no model is needed."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from modern_llm.config.data import ConversationDatasetConfig, DatasetConfig
from modern_llm.config.errors import ConfigError
from modern_llm.verbs.settings import Settings, build_section
from modern_llm.verbs.stage_settings import TrainingSettings
from modern_llm.verbs.stages import read_stage

if TYPE_CHECKING:
    from modern_llm.data.inspect.warnings import Setup


class InspectSettings(Settings):
    """Show what a data set holds: formats, lengths, truncation, bias, leakage, warnings."""

    example: ClassVar[str] = "modern-llm inspect --data pairs.jsonl --tokenizer runs/sft/last"

    config_is_of_a_stage: ClassVar[bool] = True

    data: str | None = None
    """Hub id, file or folder; or give --config with the run whose data is meant."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, or of a checkpoint that has one; rows of token ids need
    none."""
    kind: Literal["preferences", "labelled", "instructions", "documents"] | None = None
    """What the rows are; preferences by default. labelled: responses with a label, for kto."""
    plugins: list[str] = Field(default_factory=list)
    """Modules to import first, on every process: package.module,package.other. They register losses
    and formats of your own."""
    split: str | None = None
    """Split to train on."""
    columns: dict[str, str] | None = None
    """Names of the columns, as in the data section: prompt=question,chosen=best,rejected=worst."""
    eval_data: str | None = None
    """Evaluation data: Hub id, file or folder."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share that would be held out for evaluation."""
    targets: Literal["last", "all"] | None = None
    """As in the data section: turns of the assistant that are trained on."""
    template: str | None = None
    """As in the data section: chat, a text with {prompt}, or a Jinja chat template."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and answer together (documents: of a row)."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; half of max_length by default."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    """Examples of one optimizer step, for the steps of an epoch; 32 by default."""
    max_examples: Annotated[int, Field(gt=0)] | None = None
    """Look only at the first so many rows of each source."""
    examples: Annotated[int, Field(ge=0, le=20)] = 3
    """Decoded examples to show."""
    tokens: Path | None = None
    """Write what would be trained on to this file: one JSON object for each kept row, with its
    origin and token ids."""


def inspect(settings: InspectSettings) -> dict[str, Any]:
    """Measure the data and show what was found; with `--json` only the result is printed."""
    from modern_llm.data.encode.pipeline import recipe_of
    from modern_llm.data.inspect.result import inspection
    from modern_llm.data.inspect.statistics import examine
    from modern_llm.data.inspect.token_lines import token_lines
    from modern_llm.models.load import load_tokenizer
    from modern_llm.verbs.terminal import show_inspection

    section, setup, place, prompt = _request(settings)
    tokenizer = load_tokenizer(place) if place else None
    recipe = recipe_of(section, tokenizer, setup.max_length, prompt)
    with token_lines(settings.tokens, recipe) if settings.tokens else nullcontext() as sink:
        sources = examine(section, recipe, examples=settings.examples, sink=sink)
    result = inspection(sources, setup, tokenizer)
    result["tokenizer"] = place
    if settings.tokens is not None:
        result["tokens_file"] = str(settings.tokens)
    if not settings.json_output:
        show_inspection(result)
    return result


def _request(settings: InspectSettings) -> tuple[DatasetConfig, Setup, str | None, int | None]:
    """Return the data section, the run around it, the tokenizer's name and `max_prompt_length`.

    Rows of token ids need no tokenizer.

    The command line comes before the configuration file, and that before the kind's defaults.
    """
    from modern_llm.data.encode.kinds import kind_named, kind_of
    from modern_llm.data.inspect.warnings import Setup
    from modern_llm.data.table.build import holds_ids

    section = place = None
    batch, length, prompt, tokens, processes = 32, None, None, None, 1
    if settings.config is not None:
        stage, run = read_stage(settings.config)
        section, batch = _named_section(run), run.train.batch_size
        tokens, processes = run.train.most_tokens, run.train.sequence_parallel
        (length, prompt), place = stage.lengths(run), _tokenizer_of(run, stage.checkpoint(run))
        found = kind_of(section).name
        if settings.kind not in (None, found):
            raise ConfigError([f"kind {settings.kind}: {settings.config} is of a run on {found}"])
    section = _with_options(
        section or kind_named(settings.kind or "preferences").config(), settings
    )
    place = settings.tokenizer or place
    if not place and not holds_ids(section):
        raise ConfigError(["tokenizer: none is named; give --tokenizer (a Hub id or folder)"])
    kind = kind_of(section)
    setup = Setup(
        kind.name,
        settings.max_length or length or kind.default_length,
        settings.batch_size or batch,
        section.max_dropped,
        section.on_bad_row,
        tokens,
        processes,
    )
    if settings.max_prompt_length is not None:
        prompt = settings.max_prompt_length
    return section, setup, place, prompt


def _named_section(run: TrainingSettings) -> DatasetConfig:
    """Return the data section of a run, named by `train.dataset_name` where it names nothing."""
    if run.data.names or not run.train.dataset_name:
        return run.data
    return dataclasses.replace(run.data, dataset_name=run.train.dataset_name)


def _with_options(section: DatasetConfig, settings: InspectSettings) -> DatasetConfig:
    """Return the section with the options of the command line."""
    from modern_llm.data.encode.kinds import kind_of

    options = {
        "dataset_name": settings.data,
        "split": settings.split,
        "columns": settings.columns,
        "eval_dataset_name": settings.eval_data,
        "eval_fraction": settings.eval_fraction,
        "max_examples": settings.max_examples,
        "template": settings.template,
        "targets": settings.targets,
    }
    if settings.template is not None and not isinstance(section, ConversationDatasetConfig):
        raise ConfigError(["template has no effect on documents: leave it out"])
    if settings.targets is not None and not hasattr(section, "targets"):
        raise ConfigError([f"targets has no effect on {kind_of(section).name}: leave it out"])
    given = {name: value for name, value in options.items() if value is not None}
    section = build_section(partial(dataclasses.replace, section), **given)
    if not section.names:
        raise ConfigError(["data: nothing to look at; give --data FILE, or --config of a run"])
    return section


def _tokenizer_of(run: TrainingSettings, checkpoint: str | None) -> str | None:
    """Return the tokenizer that the stage would use: the argument, the checkpoint's, `train`'s."""
    if run.tokenizer_name:
        return run.tokenizer_name
    if checkpoint and not checkpoint.endswith(".pt"):
        folder = Path(checkpoint)
        if not folder.exists() or any(folder.glob("tokenizer*")):
            return checkpoint
    return run.train.tokenizer_name
