"""Configuration of the data: one section per kind (documents, instructions, preferences)."""

from __future__ import annotations

from datetime import date
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from modern_llm.config.base import Accepted, Fixed, Free, SameContent, section

RANDOM, LENGTH = "random", "length"
"""Values of `order` that are no column."""


def known_template(template: str | None) -> str | None:
    """Return `template` if it is one of the three kinds, else raise ValueError."""
    if template is None or template == "chat" or "{prompt}" in template or "{%" in template:
        return template
    raise ValueError(
        f"template {template!r} is neither `chat`, nor a text with {{prompt}} in it, "
        "nor a Jinja chat template (which has {% ... %} in it)"
    )


def known_day(day: str | None) -> str | None:
    """Return `day` if it is a day as YYYY-MM-DD, else raise ValueError."""
    try:
        if day is None or date.fromisoformat(day).isoformat() == day:
            return day
    except ValueError:
        pass
    raise ValueError(f"template_date {day!r} is not a day: write it as YYYY-MM-DD")


Template = Annotated[str, AfterValidator(known_template)]
Day = Annotated[str, AfterValidator(known_day)]
Targets = Literal["last", "all"]


@section
class MixtureSource:
    """One of several data sets to train on together."""

    dataset_name: Annotated[str, Field(min_length=1)]
    """Hub id, or a local file or folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each of its examples is used in one epoch: 2 twice, 0.5 every second one (chosen by
    content, so that they stay the same when rows are added). Held-out examples count once."""
    subset: str | None = None
    """Configuration name of a Hub data set that has several."""
    split: str | None = None
    """Split to train on, as in the section above."""
    format: str = "auto"
    """How its rows are read; the section's own where that names one."""
    columns: dict[str, str] | None = None
    """Names of its columns; the section's own by default."""


@section
class DatasetConfig:
    """Options of every kind of data: its source, the held-out part, the handling of bad rows."""

    read: ClassVar[tuple[str, ...]] = ()
    """Columns that the formats of this kind read."""
    formats: ClassVar[list[str]] = ["auto"]
    """Names of its formats; `register_format` adds to them."""

    dataset_name: SameContent[str | None] = None
    """Hub id, or a local .jsonl .json .csv .parquet .arrow (documents: .txt) file, or a folder of
    them (a snapshot of the Hub or the work of `save_to_disk` too)."""
    sources: SameContent[Annotated[list[MixtureSource], Field(min_length=1)] | None] = None
    """Several data sets in one run, in place of `dataset_name`: a list of `dataset_name`, `weight`
    and, where needed, `subset`, `split` and `format`."""
    subset: Fixed[str | None] = None
    """Configuration name of a Hub data set that has several."""
    split: Fixed[str | None] = None
    """Split to train on (default "train"). In a local folder it chooses files by any word of
    their name or of their folder's (`hh_test_0.jsonl`, `train-00000-of-00002.parquet`,
    `test/a.jsonl`); files that name none belong to train, and several splits of one kind
    (`train_sft`, `train_prefs`) are told apart by their whole name. A single local file has no
    splits: any but "train" is refused there."""
    columns: SameContent[dict[str, str] | None] = None
    """Names of the columns, where they are not those of a format: {prompt: question, chosen: best,
    rejected: worst}; on the command line also prompt=question,chosen=best,rejected=worst."""
    eval_split: Accepted[str | None] = None
    """Split to evaluate on, of the same data set, or of `eval_dataset_name` where that is set."""
    eval_dataset_name: Accepted[str | None] = None
    """Another data set (Hub id, file or folder) to evaluate on; of a Hub data set the split
    `eval_split` (default "test"), of a folder all files by default; a folder whose files name
    several splits needs `eval_split`."""
    eval_fraction: Fixed[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Share of the examples (or documents) held out for evaluation, chosen by content, so that they
    stay the same when rows are added."""
    on_bad_row: SameContent[Literal["error", "skip"]] = "error"
    """What a row of broken structure (corrupt line, missing column, not a string) does: stop the
    run, or be dropped and listed."""
    max_dropped: SameContent[Annotated[float, Field(ge=0, le=1)]] = 0.05
    """Largest share of a source's rows that may be dropped for their content; more is an error."""
    max_examples: SameContent[Annotated[int, Field(gt=0)] | None] = None
    """Use only the first so many rows of each source."""

    @field_validator("format", check_fields=False)
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in cls.formats:
            raise ValueError(f"format {value!r} is none of {', '.join(map(repr, cls.formats))}")
        return value

    @model_validator(mode="after")
    def _one_evaluation_source(self) -> DatasetConfig:
        problems = []
        for name in ("eval_split", "eval_dataset_name"):
            if self.eval_fraction is not None and getattr(self, name) is not None:
                problems.append(f"eval_fraction and {name} exclude each other: keep one of them")
        if self.eval_dataset_name is None and self.eval_split is not None:
            if self.eval_split == (self.split or "train"):
                problems.append(
                    f"eval_split {self.eval_split!r} is the split to train on: "
                    "name another, or use eval_fraction"
                )
        problems += self._column_problems() + self._mixture_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _column_problems(self) -> list[str]:
        sections = {"columns": self.columns}
        for source in self.sources or ():
            sections[f"sources: {source.dataset_name}: columns"] = source.columns
        return [
            f"{place}: no format reads a column {name!r}; those that are read: "
            f"{', '.join(self.read)}"
            for place, columns in sections.items()
            for name in columns or ()
            if name not in self.read
        ]

    def _mixture_problems(self) -> list[str]:
        if self.sources is None:
            return []
        problems = [
            f"sources and {name} exclude each other: say {name} in each source"
            for name in ("dataset_name", "subset", "split")
            if getattr(self, name) is not None
        ]
        if self.eval_split is not None and self.eval_dataset_name is None:
            problems.append(
                "eval_split needs eval_dataset_name beside sources, which have splits of their own"
            )
        problems += [
            f"sources: {source.dataset_name}: format {source.format!r} is none of "
            f"{', '.join(self.formats)}"
            for source in self.sources
            if source.format not in self.formats
        ]
        return problems

    @property
    def names(self) -> list[str]:
        """Names of the training data sets."""
        if self.sources is not None:
            return [source.dataset_name for source in self.sources]
        return [] if self.dataset_name is None else [self.dataset_name]


@section
class DocumentDatasetConfig(DatasetConfig):
    """Documents for pretraining: rows with a text column, or plain text.

    A .txt file is split at its blank lines; where it has none, each line is a document.
    """

    read: ClassVar[tuple[str, ...]] = ("text",)

    text_column: Fixed[str] = "text"
    """Column that holds the document, for formats with columns."""
    streaming: Free[bool] = False
    """Read data sets of the Hub row by row while they are tokenised, without a copy of them on the
    disk; `max_examples` says where to stop. Local files are always read so."""

    @model_validator(mode="after")
    def _one_name_of_the_text(self) -> DocumentDatasetConfig:
        if self.columns and self.text_column != "text":
            raise ValueError("columns and text_column both name the documents: keep one")
        return self


@section
class ConversationDatasetConfig(DatasetConfig):
    """What instructions and preference pairs have in common: a prompt that a template may write."""

    template: Fixed[Template | None] = None
    """`chat` wraps string prompts as a user turn; a text with `{prompt}` frames them; a Jinja chat
    template is used in place of the tokenizer's own, for strings and message lists. By default
    strings are used literally (Alpaca fields get the Alpaca frame), and messages with the
    tokenizer's chat template."""
    template_date: Fixed[Day | None] = None
    """Day (YYYY-MM-DD) that a chat template reads as today's date. By default the day of the run's
    start: it is recorded in config.yaml and kept on resume; where the reference's stored values
    were made with another day, that day."""
    order: Fixed[Annotated[str, Field(min_length=1)]] = RANDOM
    """Order of the examples, a function of (seed, epoch, step): random; length, which puts examples
    of similar length into a step; or a column of numbers, from the lowest up."""
    targets: Fixed[Targets] = "last"
    """Turns of the assistant that are trained on: last, or all. Pairs train on all that follow what
    both conversations begin with."""
    append_end_token: Fixed[bool] = True
    """Append the end token to a response that lacks it (never to one that truncation cut)."""


@section
class StreamedDatasetConfig(ConversationDatasetConfig):
    """Data of the stages that can train while it is read."""

    streaming: Fixed[bool] = False
    """Tokenize the data in windows while the run trains, so that the disk never holds all of it: a
    data set of the Hub is read row by row over the network, local files from where they are. Needs
    train.max_steps; examples are shuffled within a window."""
    streaming_window: Fixed[Annotated[int, Field(gt=0)] | None] = None
    """Examples of a window of `streaming`, rounded up to whole optimizer steps; by default
    10,000."""

    @model_validator(mode="after")
    def _one_pass_in_windows(self) -> StreamedDatasetConfig:
        problems = []
        if not self.streaming and self.streaming_window is not None:
            problems.append("streaming_window has no effect without streaming: leave it out")
        if self.streaming and self.sources is not None:
            problems.append("streaming reads one data set, not sources: name it in dataset_name")
        if self.streaming and self.order not in (RANDOM, LENGTH):
            problems.append(
                f"streaming knows no order of all rows, as order {self.order!r} is: "
                f"use {RANDOM} or {LENGTH}, which hold within a window"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


@section
class InstructionDatasetConfig(StreamedDatasetConfig):
    """Instructions with answers: Alpaca fields, message lists, or `prompt`/`response` strings."""

    read: ClassVar[tuple[str, ...]] = (
        "instruction", "input", "output", "prompt", "response", "completion", "messages",
        "conversations", "conversation", "history", "system", "tools", "prompt_ids",
        "response_ids", "response_targets", "completion_ids", "completion_targets",
    )  # fmt: skip

    formats: ClassVar[list[str]] = [
        "auto", "alpaca", "messages", "strings", "capybara", "token_ids",
    ]  # fmt: skip
    format: Fixed[str] = "auto"
    """How rows are read: alpaca, messages, strings, capybara or token_ids; by default found by
    their columns."""
    max_length: Fixed[Annotated[int, Field(ge=2)] | None] = None
    """Tokens of prompt and answer together; by default the model's positions, at most 1,024."""
    max_prompt_length: Fixed[Annotated[int, Field(ge=0)] | None] = None
    """Tokens of the prompt's end that are kept at least when prompt and answer are too long; by
    default half of max_length."""

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> InstructionDatasetConfig:
        prompt, total = self.max_prompt_length, self.max_length
        if prompt is not None and total is not None and prompt >= total:
            raise ValueError(
                f"max_prompt_length {prompt} leaves no token for the answer in max_length {total}: "
                "lower it"
            )
        return self


@section
class PreferenceDatasetConfig(StreamedDatasetConfig):
    """Preference pairs; `DPOConfig` sets their lengths."""

    values: ClassVar[dict[str, float]] = {"weight": 1.0, "margin": 0.0}
    """Numbers that pairs may have, with that of a source without them."""

    read: ClassVar[tuple[str, ...]] = (
        "prompt", "chosen", "rejected", "conversations", "history", "human_ref_A", "human_ref_B",
        "labels", "system", "tools", "weight", "margin", "question", "context", "response1",
        "response2", "overall_preference", "instruction", "completions", "answers",
        "prompt_ids", "chosen_ids", "chosen_targets", "rejected_ids", "rejected_targets",
        "responses", "scores", "ranks",
    )  # fmt: skip

    formats: ClassVar[list[str]] = [
        "auto", "hh", "shp", "strings", "messages", "sharegpt", "orca", "helpsteer",
        "ultrafeedback", "nectar", "ranking", "token_ids",
    ]  # fmt: skip
    format: Fixed[str] = "auto"
    """How rows are read: hh, shp, strings, messages, sharegpt, orca, helpsteer, ultrafeedback,
    nectar, ranking or token_ids; by default found by their columns."""
    rankings: Fixed[Literal["best_worst", "all_pairs", "whole"]] = "best_worst"
    """What a row of several judged responses becomes: the pair of the best and the worst one; all
    pairs of a better and a worse one; or one example, for dpo.loss_type plackett_luce."""
    pair_values: SameContent[list[Literal["weight", "margin"]]] = Field(
        default_factory=lambda: ["weight", "margin"]
    )
    """Columns of numbers that are read where rows have them. weight multiplies the pair's loss and
    counts it so often in every mean; margin is subtracted in the loss (DPO with an offset, Amini et
    al., 2024). `[]` reads neither."""


@section
class LabelledDatasetConfig(ConversationDatasetConfig):
    """Responses that are labelled desirable or not, or preference pairs; `KTOConfig` sets their
    lengths."""

    read: ClassVar[tuple[str, ...]] = (
        "completion", "response", "label", "messages", "completion_ids", "completion_targets",
        "response_ids", "response_targets",
        *(n for n in PreferenceDatasetConfig.read if n not in PreferenceDatasetConfig.values),
    )  # fmt: skip

    formats: ClassVar[list[str]] = [
        "auto", "labelled", "labelled_messages", "labelled_token_ids",
        *PreferenceDatasetConfig.formats[1:],
    ]  # fmt: skip
    format: Fixed[str] = "auto"
    """How rows are read: labelled, labelled_messages, labelled_token_ids, or a format of pairs as
    in the section of dpo, whose chosen response is desirable; by default found by their columns."""
