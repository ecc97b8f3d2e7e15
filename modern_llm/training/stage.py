"""Steps shared by all stages: build the token tables, run the loop, write the final model."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modern_llm.config.errors import UserError
from modern_llm.data.encode.tokenizer import tokenizer_identity
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.freed_memory import release_freed_memory
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.export.final_model import export, model_files
from modern_llm.models.flops import peak_flops
from modern_llm.models.scorer import TokenScorer
from modern_llm.setup.tables import read_tables
from modern_llm.training.callbacks import Callbacks
from modern_llm.training.checkpointing.saver import digest_of
from modern_llm.training.context import Resume
from modern_llm.training.loop import train
from modern_llm.training.monitoring.diagnostics import learning_rate_warning, spinning_threads
from modern_llm.training.monitoring.samples import make_sampler, prompt_rows
from modern_llm.training.run.data_changes import check_data, find_checkpoint
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.summary import write_summary
from modern_llm.training.streaming import Stream
from modern_llm.training.task import Task

log = logging.getLogger(__name__)


@dataclass
class StageData:
    """What a stage has read before it loads a model."""

    tables: Prepared
    """Of a dry run, the first step alone."""
    resume: Resume
    dry_run: DryRun | None = None
    """Given where one forward and backward takes the loop's place."""
    callbacks: Callbacks = field(default_factory=Callbacks)


def build_tables(
    runtime: Runtime,
    run: RunFolder,
    build: Callable[..., Prepared],
    dry_run: DryRun | None,
    callbacks: Sequence[Any] = (),
    stream: Stream | None = None,
) -> StageData:
    """Return the token tables: built once per machine, mapped and compared by every process.

    Args:
        callbacks: objects with methods of `Callback`.
        stream: given where the tables are made in windows while the run trains.

    Raises:
        UserError: the data cannot fill one step, or differs from what was trained on; an object is
            no callback.
    """
    config, own = run.config, Callbacks(callbacks)
    checkpoint = None if dry_run else find_checkpoint(runtime, run)
    if stream is not None:
        prepared = stream.open(checkpoint)
    else:
        prepared = read_tables(runtime, run.data, build)
    prepared.order_keys()  # refuses a column that no row has
    resumed_stream = stream is not None and checkpoint is not None  # maybe in a short window
    if len(prepared.train) < config.batch_size and not resumed_stream:
        raise UserError(
            f"{len(prepared.train)} examples are left to train on, fewer than one batch of "
            f"train.batch_size {config.batch_size}: lower it, or add data"
        )
    if config.follows_evaluation and prepared.evaluation is None:
        option = "keep_best" if config.keep_best else "early_stopping_patience"
        raise UserError(
            f"train.{option} needs evaluation data: set data.eval_fraction, data.eval_split or "
            "data.eval_dataset_name"
        )
    if dry_run:
        return StageData(dry_run.first_step_only(prepared, config), Resume(), dry_run)
    if stream is not None:
        stream.resume.checkpoint = checkpoint
        return StageData(prepared, stream.resume, callbacks=own)
    return StageData(*check_data(runtime, run, prepared, checkpoint), callbacks=own)


def train_and_export(
    runtime: Runtime,
    scorer: TokenScorer,
    task: Task,
    run: RunFolder,
    tokenizer: PreTrainedTokenizerBase | None,
    data: StageData,
    ends: tuple[int | None, ...] = (),
) -> Path:
    """Run the loop and write the final model as a `transformers` folder; return that folder.

    Args:
        data: what `build_tables` returned, with the fingerprints that only this stage has.
        ends: ids that end an answer besides the tokenizer's end token.
    """
    config, resume = run.config, data.resume
    if data.dry_run:
        data.dry_run.first_step(runtime, scorer, task, config)
        return run.final
    runtime.on_main(run.open)
    if runtime.is_main:
        write_summary(runtime, run, data.tables)
        full = all(parameter.requires_grad for parameter in scorer.parameters())
        size = sum(parameter.numel() for parameter in scorer.parameters())
        new = "model" in run.record
        if warning := learning_rate_warning(config, full=full, new=new, parameters=size):
            log.warning("warning: %s", warning)
        if hint := spinning_threads(runtime.device.type, torch.get_num_threads(), os.environ):
            log.info(hint)
    prompts = prompt_rows(data.tables)
    sample = make_sampler(runtime, scorer.model, tokenizer, config, run, prompts, ends)
    shape = {k: v for k, v in scorer.model.config.to_diff_dict().items() if k[0] != "_"}
    shape.pop("output_router_logits", None)  # not part of the shape; older runs did not write it
    resume.fingerprints["model"] = digest_of({**shape, "transformers_version": None})
    resume.fingerprints["tokenizer"] = tokenizer_identity(tokenizer)
    if runtime.is_main:
        resume.model_files = model_files(scorer.model, tokenizer, ends)
    peak, device = peak_flops(runtime.device, config.precision)
    if runtime.is_main and peak:
        log.info("mfu: of %.4g operations a second and process (%s)", peak, device)
    engine = train(runtime, scorer, task, run, resume, sample, peak, data.callbacks)
    runtime.on_main(run.lock.check)
    heartbeat.enter("writing the final model")
    release_freed_memory()
    export(runtime, engine, tokenizer, run.final, ends)
    runtime.release(engine)
    heartbeat.enter("ending")
    if runtime.is_main:
        log.info("final model: %s", run.final)
    return run.final
