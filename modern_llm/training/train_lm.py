"""Pretraining: a new model from a `ModernLLMConfig`, on documents packed into full rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from modern_llm.config import DocumentDatasetConfig, ModernLLMConfig, TrainingConfig
from modern_llm.data.table.build import prepare_tables
from modern_llm.distributed.notebook import one_line_errors
from modern_llm.models.build import build_model, to_transformers_config
from modern_llm.models.build_later import build_model_later
from modern_llm.setup import tables
from modern_llm.setup.micro_batches import make_sources
from modern_llm.setup.scorers import check_split, set_up_scorer
from modern_llm.setup.tokenizer import check_agreement, choose_tokenizer
from modern_llm.training import stage
from modern_llm.training.from_memory import DataLike, TokenizerLike, inputs_of
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.opening import open_run
from modern_llm.training.run.outcome import outcome_recorded
from modern_llm.training.tasks.language import LanguageTask


@one_line_errors()
def run_training(
    model_config: ModernLLMConfig,
    train_config: TrainingConfig,
    dataset_config: DocumentDatasetConfig | DataLike = None,
    tokenizer_name: TokenizerLike = None,
    dry_run: DryRun | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Pretrain a model from scratch and return its folder, `output_dir/{run_name}_final`.

    Args:
        model_config: shape of the model; rows are `max_seq_len` tokens long.
        train_config: `batch_size` counts rows. `dataset_name` names the documents unless
            `dataset_config` does.
        dataset_config: a `DocumentDatasetConfig`, or the documents: a name or rows.
        tokenizer_name: name or object; by default `train_config.tokenizer_name`.
        dry_run: if given, the run ends after one forward and backward and keeps nothing.
        callbacks: objects of `Callback` or of `transformers.TrainerCallback`.

    Raises:
        UserError: bad configuration or data; nothing was written.
        Stopped: a signal asked to stop; the same call resumes.
    """
    if dataset_config is None:
        dataset_config = DocumentDatasetConfig()
    _, data, tokenizer_name = inputs_of(
        train_config, None, dataset_config, tokenizer_name, DocumentDatasetConfig
    )
    runtime, run = open_run(
        train_config, dry_run, model=model_config, data=data, tokenizer_name=tokenizer_name
    )
    if run.finished():
        return run.final
    check_split(train_config, to_transformers_config(model_config))
    tokenizer, others = choose_tokenizer(tokenizer_name, None, train_config)
    check_agreement(tokenizer, others, data)
    with outcome_recorded(runtime, run):
        build = partial(prepare_tables, data, tokenizer, max_length=model_config.max_seq_len)
        inputs = stage.build_tables(runtime, run, build, dry_run, callbacks)
        tables.check_ids_fit(inputs.tables, tokenizer, model_config.vocab_size)
        build_policy = build_model_later if runtime.shards_weights else build_model
        model = build_policy(model_config, seed=train_config.seed)
        scorer = set_up_scorer(runtime, model, train_config, dropout=True)
        source, evaluation = make_sources(runtime, train_config, inputs.tables, scorer)
        task = LanguageTask(source, evaluation, scorer.aux_coefficient)
        return stage.train_and_export(runtime, scorer, task, run, tokenizer, inputs)
