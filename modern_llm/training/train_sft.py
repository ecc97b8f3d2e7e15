"""Supervised fine-tuning on instructions; only the tokens of the last answer are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from modern_llm.config import InstructionDatasetConfig, LoraConfig, TrainingConfig
from modern_llm.data.encode.kinds import kind_of
from modern_llm.data.table.build import prepare_tables
from modern_llm.distributed.notebook import one_line_errors
from modern_llm.models.load import inspect_checkpoint
from modern_llm.reference.adapter_free import base_fingerprint
from modern_llm.reference.template_day import with_template_day
from modern_llm.setup import policy, tables
from modern_llm.setup.micro_batches import make_sources
from modern_llm.setup.scorers import check_model
from modern_llm.setup.tokenizer import answer_ends, check_agreement, choose_tokenizer
from modern_llm.training import stage
from modern_llm.training.from_memory import DataLike, ModelLike, TokenizerLike, inputs_of
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.opening import open_run
from modern_llm.training.run.outcome import outcome_recorded
from modern_llm.training.streaming import refuse_streaming, stream_of
from modern_llm.training.tasks.language import LanguageTask


@one_line_errors()
def run_sft(
    pretrain_checkpoint: ModelLike,
    train_config: TrainingConfig,
    dataset_config: InstructionDatasetConfig | DataLike,
    tokenizer_name: TokenizerLike = None,
    dry_run: DryRun | None = None,
    lora_config: LoraConfig | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Fine-tune a checkpoint on instructions and return its folder, `output_dir/{run_name}_final`.

    Args:
        pretrain_checkpoint: Hub id, path or `PreTrainedModel`.
        train_config: `batch_size` counts responses.
        dataset_config: an `InstructionDatasetConfig`, or the instructions: a name or rows.
        tokenizer_name: name or object; else the checkpoint's, else `train_config.tokenizer_name`.
        lora_config: if given, adapters are trained beside frozen weights.
        dry_run, callbacks: end after one forward and backward; own code in the loop (`Callback`).

    Raises:
        UserError: bad configuration, checkpoint or data; nothing was written.
        Stopped: a signal asked to stop; the same call resumes.
    """
    start, data, tokenizer_name = inputs_of(
        train_config, pretrain_checkpoint, dataset_config, tokenizer_name, InstructionDatasetConfig
    )
    refuse_streaming(train_config, data)
    runtime, run = open_run(
        train_config,
        pretrain_checkpoint=start,
        data=data,
        lora=lora_config,
        tokenizer_name=tokenizer_name,
        dry_run=dry_run,
    )
    policy.check_lora(runtime, lora_config, train_config, dropout=True)
    if run.finished():
        return run.final
    checkpoint = inspect_checkpoint(start)
    tokenizer, others = choose_tokenizer(tokenizer_name, checkpoint, train_config, data)
    default = kind_of(data).default_length
    max_length = data.max_length or min(default, checkpoint.positions or default)
    check_model(train_config, checkpoint, max_length, "data.max_length")
    check_agreement(tokenizer, others, data)
    with outcome_recorded(runtime, run), ExitStack() as ends_with:
        data = with_template_day(runtime, tokenizer, data, run.record)
        lengths = {"max_length": max_length, "max_prompt_length": data.max_prompt_length}
        build = partial(prepare_tables, data, tokenizer, **lengths)
        stream = stream_of(ends_with, runtime, run, data, tokenizer, **lengths)
        inputs = stage.build_tables(runtime, run, build, dry_run, callbacks, stream)
        tables.check_ids_fit(inputs.tables, tokenizer, checkpoint.vocabulary)
        scorer = policy.set_up_policy(runtime, checkpoint, train_config, lora_config, dropout=True)
        source, evaluation = make_sources(runtime, train_config, inputs.tables, scorer)
        source = stream.source(scorer, checkpoint.vocabulary) if stream else source
        task = LanguageTask(source, evaluation, scorer.aux_coefficient)
        task.between = stream
        inputs.resume.fingerprints.update(base_fingerprint(runtime, checkpoint, lora_config))
        ends = answer_ends(tokenizer, data, inputs.tables)
        return stage.train_and_export(runtime, scorer, task, run, tokenizer, inputs, ends)
