"""Day that a chat template reads as today's date: one for a run and its reference.

Some templates write the date (Llama 3.2, gpt-oss). Tokens, and with them the names of stored
log-probs, would then change every day. A run therefore has one day, the first of these that exists:
the option `data.template_date`; on resume, the day in `config.yaml`; the day of the reference
store; today.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from modern_llm.config import InstructionDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.errors import ConfigError, StorageError
from modern_llm.data.encode.chat_template import template_source
from modern_llm.data.encode.rendering import reads_date
from modern_llm.distributed.runtime import Runtime
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.storage.atomic import write_file
from modern_llm.storage.regular_files import read_text

log = logging.getLogger(__name__)

FILE = "template-days.json"
"""Name in the folder of a store: digest of a chat template -> day with which it was filled."""
Section = TypeVar("Section", InstructionDatasetConfig, PreferenceDatasetConfig)


def with_template_day(
    runtime: Runtime,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Section,
    record: dict[str, Any] | None = None,
    store: Callable[[], ReferenceStore | None] | None = None,
) -> Section:
    """Return `data` with the day of the run, equal on every rank; unchanged if the chat template
    reads no date.

    Args:
        record: the run's configuration for `config.yaml`, in which the day is read and set.
        store: finds the reference store, on every rank; called only if its day may count, because
            it reads the weights.

    Raises:
        ConfigError: a day is set, but the template reads none.
    """
    template = "" if tokenizer is None else template_source(tokenizer, data.template)
    if not reads_date(template):
        if data.template_date is not None:
            raise ConfigError(
                [
                    f"data.template_date {data.template_date} has no effect: the chat template "
                    "does not read the date; remove it"
                ]
            )
        return data
    recorded = record["data"] if record else {}
    values = store() if store and data.template_date is None else None
    day, reason = runtime.on_main(lambda: _choose(template, data, recorded, values))
    if record:
        recorded["template_date"] = day
    if runtime.is_main:
        log.info(
            "template: the chat template reads the date, which is %s throughout (%s)", day, reason
        )
    return replace(data, template_date=day)


def _choose(
    template: str,
    data: InstructionDatasetConfig | PreferenceDatasetConfig,
    recorded: dict[str, Any],
    store: ReferenceStore | None,
) -> tuple[str, str]:
    """Return the day and its source."""
    if data.template_date is not None:
        return data.template_date, "data.template_date"
    if recorded.get("template_date"):
        try:
            return date.fromisoformat(recorded["template_date"]).isoformat(), "the run's first day"
        except (TypeError, ValueError) as error:
            raise ConfigError(
                [
                    f"data.template_date {recorded['template_date']!r} in config.yaml of the run "
                    "is not a day: set data.template_date to the day of the run's start"
                ]
            ) from error
    if store is not None:
        known = _days(store.folder).get(_name(template))
        if known is not None:
            return known, f"that of the values in {store.folder}; data.template_date sets another"
    return date.today().isoformat(), "today; data.template_date sets another"


def remember_day(
    tokenizer: PreTrainedTokenizerBase | None,
    data: PreferenceDatasetConfig,
    store: ReferenceStore | None,
) -> None:
    """Record the day of a store's pairs, unless it has one; rank 0 only."""
    if tokenizer is None or store is None or data.template_date is None:
        return
    days = _days(store.folder)
    template = _name(template_source(tokenizer, data.template))
    if template not in days and store.folder.is_dir():
        # A complete store may be read-only; the user can set data.template_date then.
        with suppress(OSError, StorageError):
            write_file(store.folder / FILE, json.dumps(days | {template: data.template_date}))


def _name(template: str) -> str:
    """Return the digest under which the file lists a template."""
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _days(folder: Path) -> dict[str, str]:
    """Return the days of a store; none if the file is missing or damaged."""
    try:
        found = json.loads(read_text(folder / FILE))
        return {str(k): date.fromisoformat(v).isoformat() for k, v in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
