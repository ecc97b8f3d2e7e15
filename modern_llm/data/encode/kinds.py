"""The kinds of data that a stage can train on: one row each.

A new kind is a configuration class, a table of formats and a row here; the columns decide what is
tokenised, stored and trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from modern_llm.config.data import (
    DatasetConfig,
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.data.read.formats import (
    DOCUMENT,
    INSTRUCTIONS,
    OWN_INSTRUCTIONS,
    OWN_PREFERENCES,
    Format,
    Record,
    document,
)
from modern_llm.data.read.labelled import LABELLED, OWN_LABELLED, labelled_responses
from modern_llm.data.read.rankings import (
    RANKED_PREFERENCES,
    RANKINGS,
    best_and_worst,
    every_pair,
    whole_ranking,
)
from modern_llm.data.read.records import LEVELS, MOST_RESPONSES
from modern_llm.data.table.token_table import STARTS


@dataclass(frozen=True)
class DataKind:
    """One kind of training data."""

    name: str
    """Name on the command line (`inspect --kind`)."""
    config: type[DatasetConfig]
    """Its configuration section."""
    formats: Callable[[Any], Sequence[Format]]
    """Section -> the forms that its rows may have, the more specific ones first."""
    columns: tuple[str, ...]
    """Columns of its token table: a prompt and its responses, or a text and its document starts."""
    default_length: int
    """Tokens of prompt and response, or of a row of documents, where nothing else sets them."""
    records: Callable[[Record], Sequence[Record]] = lambda record: (record,)
    """Record of a row -> the records that become examples."""
    values: tuple[str, ...] = ()
    """Numbers that every example has from its format."""
    held_out_by: int | None = None
    """First columns, whose content decides what `eval_fraction` holds out; None for all."""
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Value of `data.rankings` -> the fields that are different with it."""


RESPONSES = tuple(f"response_{number}" for number in range(1, MOST_RESPONSES + 1))
"""Columns of a table of rankings; those that a ranking lacks are empty."""

KINDS = (
    DataKind(
        name="preferences",
        config=PreferenceDatasetConfig,
        formats=lambda section: (*OWN_PREFERENCES, *RANKED_PREFERENCES),
        columns=("prompt", "chosen", "rejected"),
        default_length=512,
        records=best_and_worst,
        variants={
            "all_pairs": {
                "formats": lambda section: (*OWN_PREFERENCES, *RANKINGS),
                "records": every_pair,
                "held_out_by": 1,  # all pairs of a ranking on one side
            },
            "whole": {
                "formats": lambda section: (*OWN_PREFERENCES, *RANKINGS),
                "records": whole_ranking,
                "columns": ("prompt", *RESPONSES),
                "values": LEVELS,
            },
        },
    ),
    DataKind(
        name="labelled",
        config=LabelledDatasetConfig,
        formats=lambda section: (
            *OWN_LABELLED,
            *LABELLED,
            *OWN_PREFERENCES,
            *RANKED_PREFERENCES,
        ),
        columns=("prompt", "response"),
        default_length=512,
        records=labelled_responses,
        values=("label",),
        held_out_by=1,  # both responses of a pair on one side
    ),
    DataKind(
        name="instructions",
        config=InstructionDatasetConfig,
        formats=lambda section: (*OWN_INSTRUCTIONS, *INSTRUCTIONS),
        columns=("prompt", "response"),
        default_length=1024,
    ),
    DataKind(
        name="documents",
        config=DocumentDatasetConfig,
        formats=lambda section: (document(section.text_column),),
        columns=("text", STARTS),
        default_length=1024,
    ),
)


def kind_of(section: DatasetConfig) -> DataKind:
    """Return the kind of data that a section configures."""
    kind = next(kind for kind in KINDS if isinstance(section, kind.config))
    return replace(kind, **kind.variants.get(getattr(section, "rankings", ""), {}))


def format_name(section: DatasetConfig) -> str:
    """Return the name of the format that a section sets, or `auto`; documents have only one."""
    return getattr(section, "format", DOCUMENT)


def kind_named(name: str) -> DataKind:
    """Return the kind with this name."""
    return next(kind for kind in KINDS if kind.name == name)
