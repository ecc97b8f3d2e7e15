"""Steps shared by all stages: build the token tables, run the loop, write the final model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.data.encode.tokenizer import tokenizer_identity
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.freed_memory import release_freed_memory
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.export.final_model import export
from modern_llm.models.flops import peak_flops
from modern_llm.models.scorer import TokenScorer
from modern_llm.setup.tables import read_tables
from modern_llm.training.checkpointing.saver import digest_of
from modern_llm.training.loop import train
from modern_llm.training.monitoring.diagnostics import learning_rate_warning
from modern_llm.training.monitoring.samples import make_sampler, prompt_rows
from modern_llm.training.run.data_changes import check_data, find_checkpoint
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.summary import data_notes, write_summary
from modern_llm.training.task import Task

log = logging.getLogger(__name__)


def build_tables(
    runtime: Runtime, run: RunFolder, build: Callable[..., Prepared], config: TrainingConfig
) -> Prepared:
    """Return the token tables: built once per machine, mapped and compared by every process.

    Raises:
        UserError: fewer examples than one batch, or the run would resume on other data.
    """
    if run.dry_run is None:
        find_checkpoint(runtime, run)
    prepared = read_tables(runtime, run.data, build)
    if len(prepared.train) < config.batch_size:
        raise UserError(
            f"{len(prepared.train)} examples are left to train on, fewer than one batch of "
            f"train.batch_size {config.batch_size}: lower it, or add data"
        )
    run.notes["data"], run.prompts = data_notes(prepared), prompt_rows(prepared)
    if run.dry_run:
        return run.dry_run.first_step_only(prepared, config)
    return check_data(runtime, run, prepared)


def train_and_export(
    runtime: Runtime,
    scorer: TokenScorer,
    task: Task,
    config: TrainingConfig,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    ends: tuple[int | None, ...] = (),
) -> Path:
    """Run the loop and write the final model as a `transformers` folder; return that folder.

    Args:
        ends: ids that end an answer besides the tokenizer's end token.
    """
    if run.dry_run:
        run.dry_run.first_step(runtime, scorer, task, config)
        return run.final
    runtime.on_main(run.open)
    if runtime.is_main:
        write_summary(runtime, run)
        full = all(parameter.requires_grad for parameter in scorer.parameters())
        if warning := learning_rate_warning(config, full=full, new="model" in run.record):
            log.warning("warning: %s", warning)
    sample = make_sampler(runtime, scorer.model, tokenizer, config, run, ends)
    shape = {k: v for k, v in scorer.model.config.to_diff_dict().items() if k[0] != "_"}
    shape.pop("output_router_logits", None)  # not part of the shape; older runs did not write it
    facts = {
        **facts,
        "model": digest_of({**shape, "transformers_version": None}),
        "tokenizer": tokenizer_identity(tokenizer),
    }
    peak, origin = peak_flops(runtime.device, config.precision)
    if runtime.is_main:
        log.info("mfu: relative to %.4g operations per second and process (%s)", peak, origin)
    engine = train(runtime, scorer, task, run, facts, sample, peak)
    runtime.on_main(run.lock.check)
    heartbeat.enter("writing the final model")
    release_freed_memory()
    export(runtime, engine, tokenizer, run.final, ends)
    runtime.release(engine)
    heartbeat.enter("ending")
    if runtime.is_main:
        log.info("final model: %s", run.final)
    return run.final
