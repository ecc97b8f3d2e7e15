"""Lists of data sets in TRL's and Axolotl's files as our `data.dataset_name` or `data.sources`."""

from __future__ import annotations

from typing import Any

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.config.errors import ConfigError

BUILDERS = ("json", "jsonl", "csv", "parquet", "arrow", "text")
"""Names that `datasets` gives to kinds of files, in place of a data set's name."""

IGNORED = {
    "the format is found by the columns": "type",
    "the kind of a file is found by its name": "ds_type",
    "messages have role and content, or from and value": (
        "roles message_property_mappings message_field_role message_field_content"
    ),
    "code of a data set is never run": "trust_remote_code",
}
"""Reason -> options of one data set that need none here."""


COLUMNS = {
    "field_messages": "conversations", "field_prompt": "prompt", "field_chosen": "chosen",
    "field_rejected": "rejected", "field_instruction": "instruction", "field_input": "input",
    "field_output": "output", "field_system": "system", "field_tools": "tools", "field": "text",
    "text_column": "text",
}  # fmt: skip
"""Options of one data set that name a column, with our name for it."""
READ = {
    "dpo": PreferenceDatasetConfig.read,
    "kto": LabelledDatasetConfig.read,
    "sft": InstructionDatasetConfig.read,
    "pretrain": DocumentDatasetConfig.read,
}
"""Columns that the data of a stage may have."""


def sources_of(value: Any, stage: str) -> tuple[dict[str, Any], str]:
    """Return the data options that a list of data sets sets, and what they leave out."""
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if entry]
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(["the data sets are not a list of mappings with a path"])
    notes: list[str] = []
    sources = [_source(entry, READ[stage], notes) for entry in entries]
    note = "; ".join(dict.fromkeys(notes))
    if len(sources) == 1:
        return {f"data.{name}": value for name, value in sources[0].items()}, note
    return {"data.sources": sources}, note


def evaluation_source(value: Any, stage: str) -> tuple[dict[str, Any], str]:
    """Return the options of the one data set to evaluate on."""
    values, note = sources_of(value, stage)
    if "data.sources" in values:
        first = values["data.sources"][0]
        note = f"{note + '; ' if note else ''}one evaluation set here: the first of them"
        values = {f"data.{name}": value for name, value in first.items()}
    names = {"data.dataset_name": "data.eval_dataset_name", "data.split": "data.eval_split"}
    lost = [name for name in values if name not in names]
    if lost:
        note = f"{note + '; ' if note else ''}{', '.join(lost)} is the training data's own here"
    return {names[name]: value for name, value in values.items() if name in names}, note


def _source(entry: dict[str, Any], read: tuple[str, ...], notes: list[str]) -> dict[str, Any]:
    """Return one source, and note what it leaves out."""
    rest = {name: value for name, value in entry.items() if value is not None}
    path, files = rest.pop("path", None), rest.pop("data_files", None)
    if files and (path in BUILDERS or path is None):
        path, files = files, None
    if isinstance(path, list) and len(path) == 1:
        path = path[0]
    if not isinstance(path, str):
        raise ConfigError([f"a data set names no path: {entry!r:.80}"])
    if files:
        notes.append(f"data_files {files} has no equivalent: name the file as the data set")
    source: dict[str, Any] = {"dataset_name": path}
    if "name" in rest:
        source["subset"] = rest.pop("name")
    if "split" in rest:
        source["split"], mark, part = str(rest.pop("split")).partition("[")
        if mark:
            notes.append(f"the part [{part} of a split has no equivalent: data.max_examples")
    known = [name for name in COLUMNS if COLUMNS[name] in read and isinstance(rest.get(name), str)]
    named = {name: rest.pop(name) for name in known}
    columns = {COLUMNS[name]: value for name, value in named.items() if COLUMNS[name] != value}
    if columns:
        source["columns"] = columns
    for name, value in rest.items():
        reason = next((why for why, names in IGNORED.items() if name in names.split()), None)
        notes.append(f"{name}: {reason}" if reason else f"{name} {value!r:.40} has no equivalent")
    return source
