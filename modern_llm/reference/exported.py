"""Pairs with the reference's log-probs as a file for another trainer: `reference export`.

Columns are those of TRL 1.16: `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps` and
`ref_rejected_logps`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.errors import ConfigError, DataError
from modern_llm.data.table.pair_files import write_pairs
from modern_llm.data.table.token_table import TokenTable
from modern_llm.reference.commands import Request, opened
from modern_llm.reference.nonfinite_pairs import leave_out, not_finite

log = logging.getLogger(__name__)


def export_reference(request: Request, output: Path) -> dict[str, Any]:
    """Score what the store lacks, and write the training pairs with the stored log-probs.

    Held-out pairs are written beside them, to `<name>.evaluation<suffix>`.

    Returns:
        `pairs`, `evaluation_pairs` and `output`.

    Raises:
        ConfigError: the run reads no stored reference.
        DataError: the pairs have a weight, a margin or a mask, which TRL does not read.
        StorageError: a value is missing and may not be scored, or the file cannot be written.
    """
    dpo = request.dpo
    if not dpo.needs_reference or dpo.reference == "model":
        chosen = "reference: model" if dpo.needs_reference else f"loss_type {dpo.loss_name}"
        raise ConfigError([f"dpo.{chosen} stores no log-probs: there is nothing to export"])
    if dpo.reference_sync_every is not None:
        raise ConfigError(
            ["dpo.reference_sync_every moves the reference; a file has the values of one"]
        )
    with opened(request) as (runtime, references, prepared, remember):
        tables = {"train": prepared.train, "evaluation": prepared.evaluation}
        for table in tables.values():
            _refuse_what_is_lost(table)
        runtime.on_main(references.check_store)
        values = references.compute(None)
        runtime.on_main(remember)
        found = {"train": values["training pairs"], "evaluation": values.get("evaluation pairs")}
        bad = {name: not_finite(sums) for name, sums in found.items()}
        leave_out(runtime, prepared, bad, request.data.max_dropped, None)
        paths = {"train": output, "evaluation": output.with_suffix(f".evaluation{output.suffix}")}
        counts = dict.fromkeys(tables, 0)
        for name, table in tables.items():
            sums = found[name]
            if table is None or sums is None:
                continue
            rows = np.setdiff1d(np.arange(len(table)), bad[name])
            runtime.on_main(lambda p=paths[name], t=table, r=rows, s=sums: write_pairs(p, t, r, s))
            counts[name] = len(rows)
            if runtime.is_main:
                log.info("%d pairs with log-probs of the reference: %s", len(rows), paths[name])
        return {
            "pairs": counts["train"],
            "evaluation_pairs": counts["evaluation"],
            "output": str(output),
        }


def _refuse_what_is_lost(table: TokenTable | None) -> None:
    if table is not None and (table.trained != table.lengths).any():
        row = int(np.argmax((table.trained != table.lengths).any(axis=1)))
        raise DataError(
            f"{table.origin(row)}: not every token of its responses is trained on, and TRL trains "
            "on all of them: remove such rows, or set data.targets: last"
        )
    for name, default in PreferenceDatasetConfig.values.items():
        values = None if table is None else table.values(name)
        if table is not None and values is not None and (values != default).any():
            row = int(np.argmax(values != default))
            raise DataError(
                f"{table.origin(row)}: has the {name} {values[row]:g}, which TRL does not read: "
                "remove the column, or set data.pair_values: []"
            )
