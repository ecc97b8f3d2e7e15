"""The verb `inspect`: what a data section holds, before a run; no model is needed."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.verbs.settings import Settings
from modern_llm.verbs.stage_settings import (
    DpoSettings,
    PretrainSettings,
    TrainingSettings,
    read_stage,
)

if TYPE_CHECKING:
    from modern_llm.data.encode.pipeline import Recipe
    from modern_llm.data.inspect.warnings import Setup

SECTIONS: dict[str, type[DatasetConfig]] = {
    "preferences": PreferenceDatasetConfig,
    "instructions": InstructionDatasetConfig,
    "documents": DocumentDatasetConfig,
}
LENGTHS = {"preferences": 512, "instructions": 1024, "documents": 1024}


class InspectSettings(Settings):
    """Show what a data set holds: formats, lengths, truncation, bias, leakage, warnings."""

    config_is_of_a_stage: ClassVar[bool] = True

    data: str | None = None
    """Hub id, file or folder; or give --config with the run whose data is meant."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, or of a checkpoint that has one."""
    kind: Literal["preferences", "instructions", "documents"] | None = None
    """What the rows are; preferences unless said."""
    split: str | None = None
    """Split to train on."""
    eval_data: str | None = None
    """Evaluation data: Hub id, file or folder."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share that would be held out for evaluation."""
    template: str | None = None
    """As in the data section: chat, a text with {prompt}, or a Jinja chat template."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens of prompt and answer together (documents: of a row)."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; half of max_length unless said."""
    batch_size: Annotated[int, Field(gt=0)] | None = None
    """Examples of one optimizer step, for the steps of an epoch; 32 unless said."""
    max_examples: Annotated[int, Field(gt=0)] | None = None
    """Look only at the first so many rows of each source."""
    examples: Annotated[int, Field(ge=0, le=20)] = 3
    """Decoded examples to show."""
    tokens: Path | None = None
    """Write what would be trained on to this file: one JSON object for each kept row, with its
    origin and token ids."""


def inspect(settings: InspectSettings) -> dict[str, Any]:
    """Measure the data, show what was found unless `--json` asks for it alone."""
    from modern_llm.data.inspect.result import inspection
    from modern_llm.data.inspect.statistics import examine
    from modern_llm.data.inspect.token_lines import token_lines
    from modern_llm.models.load import load_tokenizer
    from modern_llm.verbs.terminal import show_inspection

    section, kind, place, setup, prompt_length = _wanted(settings)
    tokenizer = load_tokenizer(place)
    recipe = _recipe(section, tokenizer, setup.max_length, prompt_length)
    with token_lines(settings.tokens, recipe) if settings.tokens else nullcontext() as sink:
        sources = examine(section, recipe, examples=settings.examples, sink=sink)
    result = inspection(sources, setup, tokenizer)
    result["tokenizer"] = place
    if settings.tokens is not None:
        result["tokens_file"] = str(settings.tokens)
    if not settings.json_output:
        show_inspection(result)
    return result


def _wanted(settings: InspectSettings) -> tuple[DatasetConfig, str, str, Setup, int | None]:
    """The section, its kind, the tokenizer's place, and the run around it."""
    from modern_llm.data.inspect.warnings import Setup

    section, kind, place, batch, length, prompt = _from_stage(settings)
    changes = {
        "dataset_name": settings.data,
        "split": settings.split,
        "eval_dataset_name": settings.eval_data,
        "eval_fraction": settings.eval_fraction,
        "max_examples": settings.max_examples,
    }
    if settings.template is not None and kind == "documents":
        raise ConfigError(["template has no effect on documents: leave it out"])
    if settings.template is not None:
        changes["template"] = settings.template
    try:
        said = {name: value for name, value in changes.items() if value is not None}
        section = dataclasses.replace(section, **said)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if not section.names:
        raise ConfigError(["data: nothing to look at; give --data FILE, or --config of a run"])
    place = settings.tokenizer or place
    if not place:
        raise ConfigError(["tokenizer: none is named; give --tokenizer (a Hub id or folder)"])
    length = settings.max_length or length or LENGTHS[kind]
    prompt = prompt if settings.max_prompt_length is None else settings.max_prompt_length
    batch = settings.batch_size or batch
    setup = Setup(kind, length, batch, section.max_dropped, section.on_bad_row)
    return section, kind, place, setup, prompt


def _from_stage(
    settings: InspectSettings,
) -> tuple[DatasetConfig, str, str | None, int, int | None, int | None]:
    """Section, kind, tokenizer, batch size and lengths as the configuration file says them."""
    kind = settings.kind or "preferences"
    if settings.config is None:
        return SECTIONS[kind](), kind, None, 32, None, None
    stage: TrainingSettings = read_stage(settings.config)[1]
    section: DatasetConfig = stage.data  # type: ignore[attr-defined]
    found = next(name for name, schema in SECTIONS.items() if isinstance(section, schema))
    if settings.kind not in (None, found):
        raise ConfigError([f"kind {settings.kind}: {settings.config} is of a run on {found}"])
    if not section.names and stage.train.dataset_name:
        section = dataclasses.replace(section, dataset_name=stage.train.dataset_name)
    length, prompt = _lengths(stage, section)
    return section, found, _tokenizer_of(stage), stage.train.batch_size, length, prompt


def _lengths(stage: TrainingSettings, section: DatasetConfig) -> tuple[int | None, int | None]:
    if isinstance(stage, DpoSettings):
        return stage.dpo.max_length, stage.dpo.max_prompt_length
    if isinstance(stage, PretrainSettings):
        return stage.model.max_seq_len, None
    assert isinstance(section, InstructionDatasetConfig)
    return section.max_length, section.max_prompt_length


def _tokenizer_of(stage: TrainingSettings) -> str | None:
    """As the stages choose it: the argument, the checkpoint's own, the section `train`."""
    if stage.tokenizer_name:
        return stage.tokenizer_name
    checkpoint = getattr(stage, "sft_checkpoint", None) or getattr(
        stage, "pretrain_checkpoint", None
    )
    if checkpoint and not checkpoint.endswith(".pt"):
        folder = Path(checkpoint)
        if not folder.exists() or any(folder.glob("tokenizer*")):
            return checkpoint
    return stage.train.tokenizer_name


def _recipe(section: DatasetConfig, tokenizer: Any, length: int, prompt: int | None) -> Recipe:
    from modern_llm.data.encode.pipeline import answers_recipe, documents_recipe

    if isinstance(section, DocumentDatasetConfig):
        if prompt is not None:
            raise UserError("max_prompt_length has no effect on documents: leave it out")
        return documents_recipe(section, tokenizer, length)
    pairs = isinstance(section, PreferenceDatasetConfig)
    columns = ("prompt", "chosen", "rejected") if pairs else ("prompt", "response")
    return answers_recipe(
        section,  # type: ignore[arg-type]
        tokenizer,
        columns,
        max_length=length,
        max_prompt_length=prompt,
    )
