"""Reference pass without training: fill a store, verify it, or remove unused entries.

It holds one frozen model and no optimizer. Independent jobs can each fill a part of the data,
without communication.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from modern_llm.config import LabelledDatasetConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError, StorageError
from modern_llm.config.kto import KTOConfig
from modern_llm.data.table.build import Prepared, prepare_tables
from modern_llm.distributed.health.watchdog import Watchdog, nowhere
from modern_llm.distributed.runtime import Runtime, start
from modern_llm.models.load import inspect_checkpoint
from modern_llm.reference.nonfinite_pairs import leave_out
from modern_llm.reference.reference_pass import ReferencePass
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.reference.template_day import remember_day, with_template_day
from modern_llm.setup import tables
from modern_llm.setup.labelled import UNIT, read_labelled, with_others
from modern_llm.setup.scorers import check_model
from modern_llm.setup.tokenizer import check_agreement, choose_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Arguments of a DPO or KTO run, which determine its rows, tokens and reference."""

    sft_checkpoint: str
    train: TrainingConfig
    dpo: DPOConfig | KTOConfig
    data: PreferenceDatasetConfig | LabelledDatasetConfig
    tokenizer_name: str | None = None


def fill_reference(
    sft_checkpoint: str | Path,
    train_config: TrainingConfig,
    dpo_config: DPOConfig | KTOConfig,
    preference_config: PreferenceDatasetConfig | LabelledDatasetConfig,
    tokenizer_name: str | None = None,
    *,
    part: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Score what the store lacks for training and evaluation rows, without training.

    Args:
        dpo_config, preference_config: of a DPO run, or those of a KTO run.
        part: (k, n): part k of n of the data, for independent jobs.

    Returns:
        `needed found scored` in answers, `store`, `reference`.

    Raises:
        UserError: bad configuration, checkpoint or data, or nothing to fill.
        StorageError: the store cannot be written; committed shards stay.
        DataError: more than `max_dropped` of the pairs have a log-prob that is not finite.
    """
    request = Request(
        str(sft_checkpoint), train_config, dpo_config, preference_config, tokenizer_name
    )
    problems, place = [], dpo_config.section_name
    if not dpo_config.needs_reference:
        problems.append(
            f"{place}.loss_type {dpo_config.loss_name} reads no reference: there is nothing to fill"
        )
    if dpo_config.reference != "cache":
        problems.append(
            f"{place}.reference: {dpo_config.reference}: a store is filled with "
            f"{place}.reference: cache"
        )
    if not 1 <= part[0] <= part[1]:
        problems.append(f"part {part[0]}/{part[1]}: the first number must be in 1..{part[1]}")
    if problems:
        raise ConfigError(problems)
    with opened(request, part) as (runtime, references, prepared, remember):
        runtime.on_main(references.check_store)
        reports = references.fill_all()
        runtime.on_main(remember)
        bad = dict(zip(("train", "evaluation"), references.not_finite(), strict=False))
        leave_out(runtime, prepared, bad, request.data.max_dropped, None)
        totals = {
            name: sum(getattr(report, name) for report in reports)
            for name in ("needed", "found", "scored")
        }
        if runtime.is_main:
            log.info("reference: digest %s", references.digest)
        return totals | {"store": str(_store_of(references).folder), "reference": references.digest}


def verify_reference(request: Request, sample: int) -> dict[str, Any]:
    """Check every byte of a run's store, and score some of its answers again.

    Args:
        sample: answers of the training pairs to score again, rounded up to whole pairs.

    Returns:
        `store`, `shards`, `rescored`, `largest_difference` (nats per token).

    Raises:
        StorageError: a file is damaged, or a value is not what the reference's weights give.
    """
    with opened(request) as (runtime, references, *_):
        store = _store_of(references)
        shards, problems = runtime.on_main(store.verify)
        if problems:
            raise StorageError(f"{store.folder}: {'; '.join(problems)}; fill it again")
        with references.frozen(None) as scoring:
            pairs = -(-sample // 2)
            rescored, largest = references.check(references.pending[0], scoring, pairs)
        return {
            "store": str(store.folder),
            "shards": shards,
            "rescored": rescored,
            "largest_difference": largest,
        }


def keep_needed(request: Request) -> dict[str, Any]:
    """Remove every entry of the store that the training and evaluation pairs do not use."""
    with opened(request) as (runtime, references, *_):
        store = _store_of(references)
        keys = np.unique(np.concatenate([table.answers.keys for table in references.pending]))
        kept = runtime.on_main(lambda: store.keep_only(keys))
        return {"store": str(store.folder), "kept": kept}


@contextmanager
def opened(
    request: Request, part: tuple[int, int] = (1, 1)
) -> Iterator[tuple[Runtime, ReferencePass, Prepared, Callable[[], None]]]:
    """Read the data and find the store as a run does, without a run folder.

    Yields:
        Also a function that records the day of the chat template in the filled store.
    """
    data = tables.with_dataset_name(request.data, request.train)
    runtime = start(request.train)
    checkpoint = inspect_checkpoint(request.sft_checkpoint)
    name = request.tokenizer_name
    tokenizer, others = choose_tokenizer(name, checkpoint, request.train, data)
    place = f"{request.dpo.section_name}.max_length"
    check_model(request.train, checkpoint, request.dpo.max_length, place)
    check_agreement(tokenizer, others, data)
    then = "committed values are stored: the same command scores only what is missing"
    watched = Watchdog(runtime, nowhere, request.train.hang_timeout, then=lambda: then)
    with runtime, watched, tables.temporary_tables(runtime, "reference") as folder:
        find = cache(
            partial(ReferencePass, runtime, checkpoint, request.train, request.dpo, part=part)
        )
        data = with_template_day(runtime, tokenizer, data, store=lambda: find().store)
        prepared = tables.read_tables(runtime, folder, _reader(request, data, tokenizer))
        references = find()
        tables.check_ids_fit(prepared, tokenizer, references.vocabulary)
        unit = "pairs"
        if isinstance(request.dpo, KTOConfig):
            prepared, unit = with_others(request.train, request.dpo, prepared), UNIT
        references.register_all(prepared, unit)
        yield (
            runtime,
            references,
            prepared,
            partial(remember_day, tokenizer, data, references.store),
        )


def _reader(request: Request, data: Any, tokenizer: Any) -> Callable[..., Prepared]:
    """Return the function that makes the tables of a run, as `read_tables` takes it."""
    if isinstance(request.dpo, KTOConfig):
        return partial(read_labelled, data, tokenizer, request.dpo)
    return partial(
        prepare_tables,
        data,
        tokenizer,
        max_length=request.dpo.max_length,
        max_prompt_length=request.dpo.max_prompt_length,
    )


def _store_of(references: ReferencePass) -> ReferenceStore:
    """Return the store of a run, or raise `ConfigError` if it reads none."""
    if references.store is None:
        raise ConfigError(["dpo: this run reads no store (loss_type or reference: model)"])
    return references.store
