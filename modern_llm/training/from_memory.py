"""Models, tokenizers and rows that are Python objects, written once into the run folder.

A run reads files, so that it can resume and be repeated. An object is saved as
`output_dir/from_memory/{model,tokenizer,data}-<digest of its content>`: the same object again is
the same run, and another one is refused on resume like any changed input.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import UserError
from modern_llm.distributed.health import heartbeat
from modern_llm.reference.weights_digest import digest_of
from modern_llm.setup.tables import with_dataset_name
from modern_llm.storage.atomic import committed_folder, new_file, refusals
from modern_llm.storage.fault_points import around

log = logging.getLogger(__name__)

S = TypeVar("S", bound=DatasetConfig)
ModelLike = str | Path | PreTrainedModel
TokenizerLike = str | Path | PreTrainedTokenizerBase | None
DataLike = Any
"""A section, a Hub id or path, or rows: list of dicts, `datasets.Dataset`, pandas frame."""
WAIT_S = 1800.0
"""Seconds that the other processes of a machine wait for the one that writes."""


def inputs_of(
    config: TrainingConfig,
    model: ModelLike | None,
    data: DataLike,
    tokenizer: TokenizerLike,
    schema: type[S],
) -> tuple[str, S, str | None]:
    """Return the checkpoint, data section and tokenizer of a run as files name them.

    Args:
        model: None for a new model, whose checkpoint is "".
        schema: the kind of data section.

    Raises:
        UserError: an object is of another type, or has no form in a file.
        StorageError: it cannot be written.
    """
    return (
        "" if model is None else checkpoint_of(model, config),
        with_dataset_name(section_of(data, config, schema), config),
        tokenizer_of(tokenizer, model, config),
    )


def checkpoint_of(model: ModelLike, config: TrainingConfig) -> str:
    """Return the checkpoint argument of a run: a name as it is, a model as its saved folder.

    Args:
        model: Hub id, path, or a `PreTrainedModel` in any dtype, whose weights are saved as they
            are.

    Raises:
        UserError: it is something else.
        StorageError: the folder cannot be written.
    """
    if isinstance(model, (str, Path)):
        return str(model)
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"model: {type(model).__name__} is not a model: give a Hub id, a path or a "
            "transformers PreTrainedModel"
        )
    content = f"{model.config.to_json_string()} {digest_of(model.state_dict().items())}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    folder = _folder(config) / f"model-{digest[:12]}"
    _write_once(folder, lambda: _save_folder(folder, model.save_pretrained))
    return str(folder)


def tokenizer_of(
    tokenizer: TokenizerLike, model: ModelLike | None, config: TrainingConfig
) -> str | None:
    """Return the tokenizer argument of a run: a name as it is, a tokenizer as its saved folder.

    Args:
        model: as in `checkpoint_of`; a model that was loaded from somewhere brings the tokenizer
            from there where none is given.
    """
    if tokenizer is None and isinstance(model, PreTrainedModel) and model.name_or_path:
        return None if config.tokenizer_name else model.name_or_path
    if tokenizer is None or isinstance(tokenizer, (str, Path)):
        return tokenizer if tokenizer is None else str(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(
            f"tokenizer: {type(tokenizer).__name__} is not a tokenizer: give a Hub id, a folder or "
            "a transformers tokenizer"
        )
    state = [tokenizer.get_vocab(), tokenizer.chat_template, repr(tokenizer)]
    core = getattr(tokenizer, "backend_tokenizer", None)
    state.append(core.to_str() if core is not None else "")
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    folder = _folder(config) / f"tokenizer-{digest[:12]}"
    _write_once(folder, lambda: _save_folder(folder, tokenizer.save_pretrained))
    return str(folder)


def section_of(data: DataLike, config: TrainingConfig, schema: type[S]) -> S:
    """Return the data section of a run: a section as it is, a name or rows as a section."""
    if isinstance(data, schema):
        return data
    return schema(dataset_name=data_name(data, config))


def data_name(data: Any, config: TrainingConfig) -> str:
    """Return the name of a data set: a name as it is, rows as the JSONL file they are saved in.

    Raises:
        UserError: it is something else, a row is not a dict, or a value has no JSON form.
        StorageError: the file cannot be written.
    """
    if isinstance(data, (str, Path)):
        return str(data)
    rows, digest = _rows(data), hashlib.sha256()
    for line in _lines(rows):
        digest.update(line.encode())
        heartbeat.tick()
    path = _folder(config) / f"data-{digest.hexdigest()[:12]}.jsonl"

    def write() -> None:
        with new_file(path) as temporary, around("memory.write"):
            with temporary.open("w", encoding="utf-8") as out:
                out.writelines(_lines(rows))

    _write_once(path, write)
    return str(path)


def _rows(data: Any) -> Iterable[Any]:
    """Return what yields the rows of an object, each time from the first."""
    datasets, pandas = sys.modules.get("datasets"), sys.modules.get("pandas")
    if datasets is not None and isinstance(data, datasets.Dataset):
        return data
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return data.astype(object).where(data.notna(), None).to_dict("records")
    if isinstance(data, Mapping):
        splits = ", ".join(map(repr, list(data)[:5]))
        raise UserError(
            f"data: a {type(data).__name__} with {splits} is not rows: give one split, such as "
            "data['train']"
        )
    if isinstance(data, (list, tuple)):
        return data
    raise UserError(
        f"data: {type(data).__name__} is not rows: give a Hub id, a path, a list of dicts, a "
        "datasets.Dataset or a pandas frame"
    )


def _lines(rows: Iterable[Any]) -> Iterator[str]:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"data[{number}]: {type(row).__name__} is not a dict of columns")
        try:
            yield json.dumps(row, ensure_ascii=False, default=_plain) + "\n"
        except (TypeError, ValueError) as error:
            raise UserError(
                f"data[{number}]: {error}; give text, numbers, lists and dicts"
            ) from error


def _plain(value: Any) -> Any:
    """Return a number or array of numpy as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _folder(config: TrainingConfig) -> Path:
    return Path(config.output_dir) / "from_memory"


def _save_folder(folder: Path, save: Callable[[Path], Any]) -> None:
    with committed_folder(folder) as place, around("memory.write"):
        save(place)


def _write_once(target: Path, write: Callable[[], None]) -> None:
    """Write `target` unless it exists: one process of a machine does, the others wait for it."""
    if target.exists():
        return
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with refusals(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write()
        log.info("saved from memory: %s", target)
        return
    deadline = time.monotonic() + WAIT_S
    while not target.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{target}: the first process of this machine did not write it")
        time.sleep(0.1)
