"""The token tables of a run or of one pass: built once a machine, compared, judged.

Called by the stages and by the reference pass that stands alone.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.signals import stop_here
from modern_llm.models.load import check_id
from modern_llm.storage import temporary
from modern_llm.training.monitoring.samples import prompt_rows
from modern_llm.training.run.data_changes import look_back, settle
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.summary import data_notes

log = logging.getLogger(__name__)


def build_tables(
    runtime: Runtime, run: RunFolder, build: Callable[..., Prepared], config: TrainingConfig
) -> Prepared:
    """Tokenise once a machine, map everywhere, compare, and refuse data that cannot fill one
    step."""
    if run.dry_run is None:
        look_back(runtime, run)
    prepared = read_tables(runtime, run.data, build)
    if len(prepared.train) < config.batch_size:
        raise UserError(
            f"{len(prepared.train)} examples are left to train on, fewer than one batch of "
            f"train.batch_size {config.batch_size}: lower it, or add data"
        )
    run.notes["data"], run.prompts = data_notes(prepared), prompt_rows(prepared)
    if run.dry_run:
        return run.dry_run.first_step_only(prepared, config)
    return settle(runtime, run, prepared)


@contextmanager
def passing_folder(runtime: Runtime, purpose: str) -> Iterator[Path]:
    """Give a folder for tables that is the same for all processes of a machine, and goes again."""
    token = runtime.from_main(uuid.uuid4().hex if runtime.is_main else None)
    folder = Path(tempfile.gettempdir()) / f"modern-llm-{purpose}-{token}"
    temporary.remember(folder)
    try:
        yield folder
    finally:
        # The others may be done while the one that writes into it is not.
        main = runtime.accelerator.is_local_main_process
        temporary.remove(folder) if main else temporary.forget(folder)


def read_tables(runtime: Runtime, folder: Path, build: Callable[..., Prepared]) -> Prepared:
    """Tokenise once a machine, map everywhere, compare, and say what was read.

    Args:
        build: called with the folder and `check`, which it calls now and then.
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
    prepared: Prepared, tokenizer: PreTrainedTokenizerBase, *vocabularies: int | None
) -> None:
    """Refuse rows with token ids outside embeddings of so many rows; None is not checked."""
    least = min((rows for rows in vocabularies if rows is not None), default=None)
    for table in (prepared.train, prepared.evaluation):
        if table is None or least is None:
            continue
        found = table.first_with_id(least)
        if found is not None:
            row, highest = found
            check_id(highest, least, tokenizer, table.origin(row))
