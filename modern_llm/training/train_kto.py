"""KTO (Ethayarajh et al., 2024): single responses, each labelled desirable or undesirable.

As in DPO the reference scores every response once, before step 1, the mismatched ones of the KL
estimate included; `MODERN_LLM_CACHE` keeps its values.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from modern_llm.config import LabelledDatasetConfig, LoraConfig, TrainingConfig
from modern_llm.config.errors import DataError
from modern_llm.config.kto import KTOConfig
from modern_llm.data.batch.mismatched import with_mismatched
from modern_llm.data.batch.prefix_tree import Examples
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
from modern_llm.setup.micro_batches import make_sources, order_of
from modern_llm.setup.scorers import check_positions
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

UNIT = "responses"
ADVISED = (1.0, 4 / 3)
"""Range of desirable_weight * n_desirable / (undesirable_weight * n_undesirable) that the paper
advises (arXiv 2402.01306, section 4.2)."""
SLACK = 1.1
"""Factor by which that may be missed without a warning."""


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
    check_positions(kto_config.max_length, checkpoint, "kto.max_length")
    check_agreement(tokenizer, others, data)
    with outcome_recorded(runtime, run):
        find = cache(partial(ReferencePass, runtime, checkpoint, train_config, kto_config))
        data = with_template_day(runtime, tokenizer, data, run.record, lambda: find().store)
        build = partial(read_labelled, data, tokenizer, kto_config)
        inputs = stage.build_tables(runtime, run, build, dry_run, callbacks)
        _advise(runtime, kto_config, inputs.tables)
        reference = find()
        tables.check_ids_fit(inputs.tables, tokenizer, checkpoint.vocabulary, reference.vocabulary)
        prepared = _look_up(reference, train_config, kto_config, inputs.tables)
        runtime.on_main(lambda: remember_day(tokenizer, data, reference.store))
        scorer = policy.set_up_policy(runtime, checkpoint, train_config, lora_config, dropout=False)
        task = _task(runtime, run, scorer, kto_config, data, prepared, reference)
        base = base_fingerprint(runtime, checkpoint, lora_config)
        inputs.resume.fingerprints.update(base, reference=reference.digest, plan=task.plan)
        ends = answer_ends(tokenizer, data, inputs.tables)
        return stage.train_and_export(runtime, scorer, task, run, tokenizer, inputs, ends)


def read_labelled(
    data: LabelledDatasetConfig, tokenizer: Any, config: KTOConfig, *arguments: Any, **options: Any
) -> Prepared:
    """Return the tables of labelled responses, as `prepare_tables` does with these arguments.

    Raises:
        DataError: the training rows have one label alone, or one prompt alone.
    """
    lengths = {"max_length": config.max_length, "max_prompt_length": config.max_prompt_length}
    prepared = prepare_tables(data, tokenizer, *arguments, **lengths, **options)
    table = prepared.train
    labels = table.values("label")
    assert labels is not None
    if labels.min() == labels.max():
        word = "desirable" if labels[0] else "undesirable"
        raise DataError(
            f"{prepared.report.source}: all {len(table)} training rows are labelled {word}: KTO "
            "needs both labels; add rows of the other, or use sft on desirable ones"
        )
    if config.needs_kl and Examples(table, trees=False).prompt_numbers().max() == 0:
        raise DataError(
            f"{prepared.report.source}: all {len(table)} training rows have the same prompt: "
            "kto.loss_type kto compares with responses to other prompts; add rows, or use "
            "apo_zero_unpaired"
        )
    return prepared


def _advise(runtime: Runtime, config: KTOConfig, prepared: Prepared) -> None:
    if runtime.is_main and (advice := imbalance(config, prepared)):
        log.warning("warning: %s", advice)


def imbalance(config: KTOConfig, prepared: Prepared) -> str | None:
    """Return advice where the weights do not balance the labels as the paper advises, else None."""
    labels = prepared.train.values("label")
    assert labels is not None
    good = float(labels.sum())
    bad = len(labels) - good
    if not good or not bad:  # the first step of a dry run
        return None
    low, high = ADVISED
    ratio = config.desirable_weight * good / max(config.undesirable_weight * bad, 1e-300)
    if low / SLACK <= ratio <= high * SLACK:
        return None
    if ratio < low:
        name, one = "desirable_weight", config.undesirable_weight * bad / good
        advised = one * low, one * high
    else:
        name, one = "undesirable_weight", config.desirable_weight * good / bad
        advised = one / high, one / low
    return (
        f"{good:,.0f} rows are desirable and {bad:,.0f} undesirable: the authors of KTO advise "
        f"kto.{name} of {advised[0]:.3g} to {advised[1]:.3g}"
    )


def with_others(train: TrainingConfig, config: KTOConfig, prepared: Prepared) -> Prepared:
    """Return the tables with a mismatched response for every row, if the loss needs them."""
    if not config.needs_kl:
        return prepared
    order = order_of(
        train, len(prepared.train), prepared.history, by=prepared.order, keys=prepared.order_keys()
    )
    size, length = train.batch_size, config.max_length
    evaluation = prepared.evaluation
    if evaluation is not None:
        evaluation = with_mismatched(evaluation, size, length)
    table = with_mismatched(prepared.train, size, length, order)
    return dataclasses.replace(prepared, train=table, evaluation=evaluation)


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
