"""KTO (Ethayarajh et al., 2024): single responses, each labelled desirable or undesirable.

As in DPO the reference scores every response once, before step 1, the mismatched ones of the KL
estimate included; `MODERN_LLM_CACHE` keeps its values.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from modern_llm.config import LabelledDatasetConfig, LoraConfig, TrainingConfig
from modern_llm.config.kto import KTOConfig
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.notebook import one_line_errors
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.load import inspect_checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.adapter_free import base_fingerprint
from modern_llm.reference.nonfinite_pairs import exclude_from_run
from modern_llm.reference.reference_pass import ReferencePass
from modern_llm.reference.template_day import remember_day, with_template_day
from modern_llm.setup import policy, tables
from modern_llm.setup.labelled import UNIT, check_evaluation, imbalance, read_labelled, with_others
from modern_llm.setup.micro_batches import make_sources
from modern_llm.setup.scorers import check_model
from modern_llm.setup.tokenizer import answer_ends, check_agreement, choose_tokenizer
from modern_llm.training import stage
from modern_llm.training.from_memory import DataLike, ModelLike, TokenizerLike, inputs_of
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.opening import open_run
from modern_llm.training.run.outcome import outcome_recorded
from modern_llm.training.tasks.labelled import LabelledTask

__all__ = ["KTOConfig", "run_kto"]

log = logging.getLogger(__name__)


@one_line_errors()
def run_kto(
    sft_checkpoint: ModelLike,
    train_config: TrainingConfig,
    kto_config: KTOConfig,
    dataset_config: LabelledDatasetConfig | DataLike,
    tokenizer_name: TokenizerLike = None,
    dry_run: DryRun | None = None,
    lora_config: LoraConfig | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Train a policy on labelled responses and return its folder, `output_dir/{run_name}_final`.

    Args:
        sft_checkpoint: policy and, by default, reference: Hub id, path or `PreTrainedModel`.
        train_config, kto_config: `batch_size` counts responses; the loss and its options.
        dataset_config: a `LabelledDatasetConfig`, or the responses: a name or rows.
        tokenizer_name: name or object; else the checkpoint's, else `train_config.tokenizer_name`.
        lora_config: if given, adapters are trained; the reference is the model without them.
        dry_run, callbacks: end after one forward and backward; own code in the loop (`Callback`).

    Raises:
        UserError: bad configuration, checkpoint or data; nothing was written.
        StorageError: the reference store refuses, or its values are not this policy's.
        Stopped: a signal asked to stop; the same call resumes.
    """
    start, data, tokenizer_name = inputs_of(
        train_config, sft_checkpoint, dataset_config, tokenizer_name, LabelledDatasetConfig
    )
    runtime, run = open_run(
        train_config,
        dry_run,
        sft_checkpoint=start,
        kto=kto_config,
        data=data,
        lora=lora_config,
        tokenizer_name=tokenizer_name,
    )
    policy.check_lora(runtime, lora_config, train_config, dropout=False)
    if run.finished():
        return run.final
    checkpoint = inspect_checkpoint(start)
    tokenizer, others = choose_tokenizer(tokenizer_name, checkpoint, train_config, data)
    check_model(train_config, checkpoint, kto_config.max_length, "kto.max_length")
    check_agreement(tokenizer, others, data)
    with outcome_recorded(runtime, run):
        find = cache(partial(ReferencePass, runtime, checkpoint, train_config, kto_config))
        data = with_template_day(runtime, tokenizer, data, run.record, lambda: find().store)
        build = partial(read_labelled, data, tokenizer, kto_config)
        inputs = stage.build_tables(runtime, run, build, dry_run, callbacks)
        _check_labels(runtime, train_config, kto_config, inputs.tables)
        reference = find()
        tables.check_ids_fit(inputs.tables, tokenizer, *reference.vocabularies)
        prepared = _look_up(reference, train_config, kto_config, inputs.tables)
        runtime.on_main(lambda: remember_day(tokenizer, data, reference.store))
        scorer = policy.set_up_policy(runtime, checkpoint, train_config, lora_config, dropout=False)
        task = _task(runtime, run, scorer, kto_config, data, prepared, reference)
        base = base_fingerprint(runtime, checkpoint, lora_config)
        inputs.resume.fingerprints.update(base, reference=reference.digest, plan=task.plan)
        ends = answer_ends(tokenizer, data, inputs.tables)
        return stage.train_and_export(runtime, scorer, task, run, tokenizer, inputs, ends)


def _check_labels(
    runtime: Runtime, train: TrainingConfig, config: KTOConfig, prepared: Prepared
) -> None:
    """Refuse labels that the run cannot use, and advise weights where they do not balance."""
    check_evaluation(train, prepared)
    if runtime.is_main and (advice := imbalance(config, prepared)):
        log.warning("warning: %s", advice)


def _look_up(
    reference: ReferencePass, train: TrainingConfig, config: KTOConfig, prepared: Prepared
) -> Prepared:
    """Return the tables with mismatched responses, after the store was checked for them."""
    prepared = with_others(train, config, prepared)
    reference.look_up(prepared, UNIT)
    return prepared


def _task(
    runtime: Runtime,
    run: RunFolder,
    scorer: TokenScorer,
    config: KTOConfig,
    data: LabelledDatasetConfig,
    prepared: Prepared,
    reference: ReferencePass,
) -> LabelledTask:
    """Compute the missing reference values, and return the task without non-finite rows.

    Must run before the loop loads a checkpoint: here the scorer still has the initial weights, on
    resume too, so that the reference is never a trained policy.
    """
    values = reference.compute(scorer)
    left_out = exclude_from_run(
        runtime,
        prepared,
        values,
        max_dropped=data.max_dropped,
        batch_size=run.config.batch_size,
        folder=run.data,
        unit=UNIT,
    )
    source, evaluation = make_sources(
        runtime, run.config, prepared, scorer, left_out=left_out, responses=("response",)
    )
    return LabelledTask(
        runtime,
        config,
        source,
        values.get(f"training {UNIT}"),
        evaluation,
        values.get(f"evaluation {UNIT}"),
        scorer.aux_coefficient,
        live=reference.reference_model(scorer),
    )
