"""Tables of labelled responses: read and checked, each row with a response to another prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

from modern_llm.config import LabelledDatasetConfig, TrainingConfig
from modern_llm.config.errors import ConfigError, DataError
from modern_llm.config.kto import KTOConfig
from modern_llm.data.batch.mismatched import with_mismatched
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.table.build import Prepared, prepare_tables
from modern_llm.setup.micro_batches import order_of

UNIT = "responses"
ADVISED = (1.0, 4 / 3)
"""Range of desirable_weight * n_desirable / (undesirable_weight * n_undesirable) that the paper
advises (arXiv 2402.01306, section 4.2)."""
SLACK = 1.1
"""Factor by which that may be missed without a warning."""


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


def check_evaluation(train: TrainingConfig, prepared: Prepared) -> None:
    """Refuse evaluation data without the label that `train.best_metric` is a mean over.

    Raises:
        ConfigError: the run would end at its first evaluation.
    """
    labels = None if prepared.evaluation is None else prepared.evaluation.values("label")
    name = train.best_metric or ""
    if labels is None or not train.follows_evaluation:
        return
    lacks = {
        "desirable": name.endswith(("/chosen", "/margins")) and not labels.any(),
        "undesirable": name.endswith("/margins") and labels.all(),
    }
    if missing := [label for label, lacking in lacks.items() if lacking]:
        raise ConfigError(
            [
                f"train.best_metric {name}: no evaluation row is labelled {missing[0]}: add some, "
                "or use eval/loss"
            ]
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
