"""`modern-llm score`: log-prob sums of both answers of every pair, under one or two models.

Any number of processes; rank 0 writes one JSON object per pair, in the order of the data.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.data.table.build import Prepared, prepare_tables
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed import runtime as distributed
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.watchdog import Watchdog, nowhere
from modern_llm.distributed.shutdown.signals import stop_here
from modern_llm.models.load import Checkpoint, inspect_checkpoint
from modern_llm.reference.answers import Answers
from modern_llm.reference.nonfinite_pairs import LIST, leave_out, not_finite
from modern_llm.reference.scoring import Scoring, score_everywhere
from modern_llm.setup import tables
from modern_llm.setup.micro_batches import sharing
from modern_llm.setup.scorers import check_model, set_up_frozen
from modern_llm.setup.tokenizer import choose_tokenizer
from modern_llm.storage.atomic import write_file
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.temporary import temporary_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Pairs of a data set with their log-prob sums under one or two models.

    Attributes:
        columns: `policy` and, if given, `reference` -> sums and target counts, (P, 2) each.
        rows: (P,) rows of the table; pairs with a non-finite sum are excluded.
        dropped: number of rows excluded for their content or for a non-finite sum.
    """

    runtime: distributed.Runtime
    prepared: Prepared
    columns: dict[str, tuple[torch.Tensor, torch.Tensor]]
    rows: NDArray[np.int64]
    dropped: int

    def sums(self, name: str) -> NDArray[np.float64]:
        """Return (P, 2) log-prob sums in nats."""
        return self.columns[name][0].double().numpy()

    def values(self, name: str) -> NDArray[np.float64] | None:
        """Return (P,) a number of the pairs, `weight` or `margin`, where the data has it."""
        found = self.prepared.train.values(name)
        return None if found is None else found[self.rows]

    @property
    def counts(self) -> NDArray[np.int64]:
        """(P, 2) numbers of target tokens."""
        return self.columns["policy"][1].numpy()


@contextmanager
def scored_pairs(
    model: str,
    data: PreferenceDatasetConfig,
    *,
    reference: str | None = None,
    tokenizer_name: str | None = None,
    max_length: int = 512,
    max_prompt_length: int | None = None,
    mixed_precision: str = "no",
    hang_timeout: float | None = 600.0,
    sequence_parallel: int = 1,
) -> Iterator[Scored]:
    """Yield the pairs of `data` with their sums, on every process, under a watchdog.

    The table is deleted when the context ends.

    Args:
        hang_timeout, sequence_parallel: as in the section `train`.
    """
    if data.rankings == "whole":
        raise ConfigError(["data.rankings: whole: pairs are scored: use all_pairs or best_worst"])
    with temporary_folder("score") as folder:
        config = TrainingConfig(
            run_name="score",
            output_dir=folder,
            tokenizer_name=tokenizer_name,
            batch_size=1,
            mixed_precision=mixed_precision,  # type: ignore[arg-type]
            hang_timeout=hang_timeout,
            sequence_parallel=sequence_parallel,
        )
        runtime = distributed.start(config)
        then = "nothing was written: run the same command again"
        with runtime, Watchdog(runtime, nowhere, hang_timeout, then=lambda: then):
            policy = inspect_checkpoint(model)
            tokenizer, _ = choose_tokenizer(tokenizer_name, policy, config, data)
            check_model(config, policy, max_length, "max_length")
            lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
            prepared = _read(runtime, data, tokenizer, folder / "data", lengths)
            models = {"policy": policy}
            if reference is not None:
                models["reference"] = inspect_checkpoint(reference)
            tables.check_ids_fit(prepared, tokenizer, *(m.vocabulary for m in models.values()))
            yield _scored(runtime, prepared, models, config, data.max_dropped)


def _read(
    runtime: distributed.Runtime,
    data: PreferenceDatasetConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    lengths: dict[str, int | None],
) -> Prepared:
    """Read and tokenise the data, on each process separately, into a temporary table."""

    def check() -> None:
        heartbeat.tick()
        stop_here("while it read the data", main=runtime.is_main)

    heartbeat.enter("reading the data")
    with runtime.failing_together():
        return prepare_tables(data, tokenizer, folder, check=check, **lengths)


def _scored(
    runtime: distributed.Runtime,
    prepared: Prepared,
    models: dict[str, Checkpoint],
    config: TrainingConfig,
    max_dropped: float,
) -> Scored:
    """Score all pairs under each model, and exclude those with a non-finite sum."""
    table = prepared.train
    columns = {name: _sums(runtime, model, table, config) for name, model in models.items()}
    heartbeat.enter("judging and writing")
    bad = not_finite(np.concatenate([sums.numpy() for sums, _ in columns.values()], axis=1))
    whose = " or ".join(model.place for model in models.values())
    listed = table.folder.parent / LIST
    out = leave_out(runtime, prepared, {"train": bad}, max_dropped, listed, whose)
    rows = np.setdiff1d(np.arange(len(table)), bad)
    kept = {name: (sums[rows], counts[rows]) for name, (sums, counts) in columns.items()}
    return Scored(runtime, prepared, kept, rows, prepared.report.dropped + out)


def score_pairs(
    model: str,
    data: PreferenceDatasetConfig,
    output: Path,
    *,
    reference: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Score the pairs of `data` and write one JSON object per pair to `output`.

    Fields: `origin` (file and row), `policy_chosen policy_rejected [reference_chosen
    reference_rejected]`, log-prob sums in nats, and `chosen_tokens rejected_tokens`, numbers of
    target tokens; `weight` and `margin` where the data has them.

    Args:
        options: options of `scored_pairs`: `tokenizer_name`, `max_length`, `max_prompt_length`,
            `mixed_precision`, `hang_timeout`, `sequence_parallel`.

    Returns:
        `pairs`, `dropped` and `output`.
    """
    if not output.parent.is_dir():
        raise UserError(
            f"output {output}: {output.parent} is not a folder; create it or name another path"
        )
    with scored_pairs(model, data, reference=reference, **options) as scored:
        runtime, pairs = scored.runtime, len(scored.rows)
        if runtime.is_main:
            lines = (f"{json.dumps(row)}\n" for row in _rows(scored))
            write_file(output, "".join(lines))
            log.info("%d pairs scored: %s", pairs, output)
        runtime.barrier()
        return {"pairs": pairs, "output": str(output)} | _dropped(scored, output)


def _dropped(scored: Scored, output: Path) -> dict[str, Any]:
    """Log the excluded rows, and write their list beside the output."""
    report, missing = scored.prepared.report, scored.dropped
    listed = scored.prepared.train.folder.parent / LIST
    if scored.runtime.is_main:
        for line in report.lines():
            log.info("data: %s", line)
        if missing:
            beside = output.with_suffix(".dropped_rows.jsonl")
            write_file(beside, read_text(listed))
            log.info("dropped rows: %s", beside)
    return {"dropped": missing}


def _sums(
    runtime: distributed.Runtime, checkpoint: Checkpoint, table: TokenTable, config: TrainingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums and target counts (P, 2) of every pair under one model."""
    heartbeat.enter("preparing the model")
    scorer = set_up_frozen(runtime, checkpoint, config)
    module = runtime.freeze(scorer)
    scoring = Scoring(runtime, module, config, shared=sharing(scorer))
    answers = Answers(table)
    found = score_everywhere(runtime, scoring, answers)
    runtime.release(module)
    sums, counts = found.sums[answers.of_pairs], found.counts[answers.of_pairs]
    return torch.from_numpy(sums), torch.from_numpy(counts)


def _rows(scored: Scored) -> list[dict[str, Any]]:
    table = scored.prepared.train
    rows: list[dict[str, Any]] = [{"origin": table.origin(int(row))} for row in scored.rows]
    for name, (sums, _) in scored.columns.items():
        for row, (chosen, rejected) in zip(rows, sums.tolist(), strict=True):
            row |= {f"{name}_chosen": chosen, f"{name}_rejected": rejected}
    for row, (chosen, rejected) in zip(rows, scored.counts.tolist(), strict=True):
        row |= {"chosen_tokens": chosen, "rejected_tokens": rejected}
    for name in PreferenceDatasetConfig.values:
        if (values := scored.values(name)) is not None:
            for row, value in zip(rows, values.tolist(), strict=True):
                row[name] = value
    return rows
