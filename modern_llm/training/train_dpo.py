"""DPO (Rafailov et al., 2023) and its family: a reference pass, a check of it, then the loop.

The reference scores every response once, before step 1; `MODERN_LLM_CACHE` keeps its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from modern_llm.config import LoraConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.data import RANDOM
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError
from modern_llm.data.table.build import Prepared, prepare_tables
from modern_llm.distributed.notebook import one_line_errors
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.load import inspect_checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.adapter_free import base_fingerprint
from modern_llm.reference.nonfinite_pairs import exclude_from_run
from modern_llm.reference.reference_pass import ReferencePass
from modern_llm.reference.template_day import remember_day, with_template_day
from modern_llm.setup import policy, tables
from modern_llm.setup.micro_batches import make_sources
from modern_llm.setup.scorers import check_model
from modern_llm.setup.tokenizer import answer_ends, check_agreement, choose_tokenizer
from modern_llm.training import stage
from modern_llm.training.from_memory import DataLike, ModelLike, TokenizerLike, inputs_of
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.opening import open_run
from modern_llm.training.run.outcome import outcome_recorded
from modern_llm.training.streaming import Stream, refuse_streaming, stream_of
from modern_llm.training.tasks.preference import PreferenceTask
from modern_llm.training.window_values import WindowValues, refuse_values

__all__ = ["DPOConfig", "run_dpo"]


@one_line_errors()
def run_dpo(
    sft_checkpoint: ModelLike,
    train_config: TrainingConfig,
    dpo_config: DPOConfig,
    preference_config: PreferenceDatasetConfig | DataLike,
    tokenizer_name: TokenizerLike = None,
    dry_run: DryRun | None = None,
    lora_config: LoraConfig | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train a policy on preference pairs and return its folder, `output_dir/{run_name}_final`.

    Args:
        sft_checkpoint: policy and, by default, reference: Hub id, path or `PreTrainedModel`.
        train_config, dpo_config: `batch_size` counts pairs; the loss and its options.
        preference_config: a `PreferenceDatasetConfig`, or the pairs: a name or rows.
        tokenizer_name: name or object; else the checkpoint's, else `train_config.tokenizer_name`.
        lora_config: if given, adapters are trained; the reference is the model without them.
        dry_run, callbacks: end after one forward and backward; own code in the loop (`Callback`).

    Raises:
        UserError: bad configuration, checkpoint or data; nothing was written.
        StorageError: the reference store refuses, or its values are not this policy's.
        Stopped: a signal asked to stop; the same call resumes.
    """
    given = (train_config, sft_checkpoint, preference_config, tokenizer_name)
    start, data, tokenizer_name = inputs_of(*given, PreferenceDatasetConfig)
    dpo_config.refuse_rankings(data.rankings)
    refuse_streaming(train_config, data, moving=dpo_config.reference_sync_every is not None)
    runtime, run = open_run(
        train_config, dry_run, sft_checkpoint=start, dpo=dpo_config, data=data, lora=lora_config,
        tokenizer_name=tokenizer_name,
    )  # fmt: skip
    policy.check_lora(runtime, lora_config, train_config, dropout=False)
    if run.finished():
        return run.final
    checkpoint = inspect_checkpoint(start)
    tokenizer, others = choose_tokenizer(tokenizer_name, checkpoint, train_config, data)
    check_model(train_config, checkpoint, dpo_config.max_length, "dpo.max_length")
    check_agreement(tokenizer, others, data)
    with outcome_recorded(runtime, run), ExitStack() as ends_with:
        find = cache(partial(ReferencePass, runtime, checkpoint, train_config, dpo_config))
        data = with_template_day(runtime, tokenizer, data, run.record, lambda: find().store)
        lengths = _lengths(dpo_config)
        build = partial(prepare_tables, data, tokenizer, **lengths)
        stream = stream_of(ends_with, runtime, run, data, tokenizer, **lengths)
        inputs = stage.build_tables(runtime, run, build, dry_run, callbacks, stream)
        _check_tables(dpo_config, inputs.tables)
        reference = find()
        tables.check_ids_fit(inputs.tables, tokenizer, *reference.vocabularies)
        reference.look_up(inputs.tables)
        runtime.on_main(lambda: remember_day(tokenizer, data, reference.store))
        scorer = policy.set_up_policy(runtime, checkpoint, train_config, lora_config, dropout=False)
        task = _task(runtime, run, scorer, dpo_config, data, inputs, reference, stream)
        base = base_fingerprint(runtime, checkpoint, lora_config)
        inputs.resume.fingerprints.update(base, reference=reference.digest, plan=task.plan)
        ends = answer_ends(tokenizer, data, inputs.tables)
        return stage.train_and_export(runtime, scorer, task, run, tokenizer, inputs, ends)


def _lengths(config: DPOConfig) -> dict[str, int | None]:
    return {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}


def _check_tables(config: DPOConfig, prepared: Prepared) -> None:
    """Refuse weights and margins that the loss cannot use, and two orders of the pairs."""
    if config.group_by_prompt and prepared.order != RANDOM:
        raise ConfigError(
            [f"dpo.group_by_prompt and data.order {prepared.order}: both order the pairs: keep one"]
        )
    refuse_values(config, prepared)


def _task(
    runtime: Runtime,
    run: RunFolder,
    scorer: TokenScorer,
    dpo_config: DPOConfig,
    data: PreferenceDatasetConfig,
    inputs: stage.StageData,
    reference: ReferencePass,
    stream: Stream | None,
) -> PreferenceTask:
    """Compute the missing reference values, and return the task without non-finite pairs.

    Must run before the loop loads a checkpoint: here the scorer still has the initial weights, on
    resume too, so that the reference is never a trained policy. Where the pairs come in windows,
    these are the values of the first one.
    """
    if inputs.dry_run:
        stream = None  # it computes the first step of the first window alone
    values = reference.compute(scorer)
    stored: Any = values.get("training pairs")
    if stream is not None:
        stored = WindowValues(runtime, dpo_config, data, reference, stored, run.data)
        values = {"evaluation pairs": values.get("evaluation pairs")}
    scorer.log_squares = dpo_config.use_weighting
    left_out = exclude_from_run(
        runtime,
        inputs.tables,
        values,
        max_dropped=data.max_dropped,
        batch_size=1 if stream else run.config.batch_size,
        folder=run.data,
    )
    source, evaluation = make_sources(
        runtime,
        run.config,
        inputs.tables,
        scorer,
        group_by_prompt=dpo_config.group_by_prompt,
        left_out=left_out,
    )
    if stream is not None:
        source = stream.source(
            scorer,
            *reference.vocabularies,
            examine=stored.look,
            group_by_prompt=dpo_config.group_by_prompt,
        )
        stored = stored.current
    task = PreferenceTask(
        runtime,
        dpo_config,
        source,
        stored,
        evaluation,
        values.get("evaluation pairs"),
        scorer.aux_coefficient,
        live=reference.reference_model(scorer),
    )
    task.between = stream or task.between
    return task
