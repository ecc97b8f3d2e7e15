"""Token tables: built once per machine, the same on every rank, with ids the model knows."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import ConfigError
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.signals import stop_here
from modern_llm.models.load import check_id
from modern_llm.storage import temporary

log = logging.getLogger(__name__)


def with_dataset_name(data: DatasetConfig, config: TrainingConfig) -> DatasetConfig:
    """Return `data` with its data set's name, which `train.dataset_name` may give instead."""
    if data.sources is not None:
        if config.dataset_name:
            raise ConfigError(
                ["train.dataset_name has no effect beside data.sources: remove one of them"]
            )
        return data
    if data.dataset_name and config.dataset_name and data.dataset_name != config.dataset_name:
        raise ConfigError(
            [
                f"data.dataset_name {data.dataset_name!r} and train.dataset_name "
                f"{config.dataset_name!r} "
                "name different data: remove one of them"
            ]
        )
    name = data.dataset_name or config.dataset_name
    if not name:
        raise ConfigError(
            ["data.dataset_name: no data set is named; give a Hub id, a file or a folder"]
        )
    return dataclasses.replace(data, dataset_name=name)


@contextmanager
def temporary_tables(runtime: Runtime, purpose: str) -> Iterator[Path]:
    """Yield a temporary folder for tables, the same on all processes of a machine."""
    token = runtime.from_main(uuid.uuid4().hex if runtime.is_main else None)
    folder = Path(tempfile.gettempdir()) / f"modern-llm-{purpose}-{token}"
    temporary.remember(folder)
    try:
        yield folder
    finally:
        # Other processes may finish before the one that writes.
        main = runtime.accelerator.is_local_main_process
        temporary.remove(folder) if main else temporary.forget(folder)


def read_tables(runtime: Runtime, folder: Path, build: Callable[..., Prepared]) -> Prepared:
    """Tokenise once per machine, map on every process, compare, and log what was read.

    Args:
        build: called with the folder and a `check` to call after each batch of rows.
    """

    def check() -> None:
        heartbeat.tick()
        runtime.may_write()
        stop_here("while it read the data", main=runtime.is_main)

    heartbeat.enter("reading the data")
    with runtime.one_per_machine_first():
        prepared = build(folder, check=check)
    heartbeat.enter("preparing the model")
    runtime.agree(prepared.train.digest, "the training data")
    if runtime.is_main:
        for line in prepared.lines():
            log.info("data: %s", line)
        if prepared.evaluation is None:
            log.info("evaluation: none, because no evaluation data is named")
    return prepared


def check_ids_fit(
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase | None, *vocabularies: int | None
) -> None:
    """Refuse token ids outside embeddings with these numbers of rows; None is not checked."""
    least = min((rows for rows in vocabularies if rows is not None), default=None)
    for table in (prepared.train, prepared.evaluation):
        if table is None or least is None:
            continue
        found = table.first_with_id(least)
        if found is not None:
            row, highest = found
            check_id(highest, least, tokenizer, table.origin(row))
