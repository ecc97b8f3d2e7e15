"""Supervised fine-tuning on instructions: the loss stands on the tokens of the last answer."""

from __future__ import annotations

from pathlib import Path

from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.data.instruction_datasets import build_instruction_tables
from modern_llm.models.load import inspect_checkpoint, load_model
from modern_llm.training import setup
from modern_llm.training.dry_run import DryRun
from modern_llm.training.language_task import LanguageTask

# Longest answers with their prompts where the user says nothing and the model has more positions.
DEFAULT_MAX_LENGTH = 1024


def run_sft(
    pretrain_checkpoint: str | Path,
    train_config: TrainingConfig,
    dataset_config: InstructionDatasetConfig,
    tokenizer_name: str | None = None,
    dry_run: DryRun | None = None,
) -> Path:
    """Fine-tune a checkpoint on instructions and return its folder, `output_dir/{run_name}_final`.

    Args:
        pretrain_checkpoint: Hub id, `transformers` folder or `.pt` file.
        train_config: `batch_size` counts answers.
        dataset_config: where the instructions are, and their template.
        tokenizer_name: Hub id or folder; else the checkpoint's, else `train_config.tokenizer_name`.
        dry_run: given, the run ends after one forward and backward and keeps nothing.

    Raises:
        UserError: bad configuration, checkpoint or data; nothing was written.
        Stopped: a signal asked to stop; the same call goes on.
    """
    data = setup.with_dataset_name(dataset_config, train_config)
    runtime, run = setup.open_run(
        train_config,
        pretrain_checkpoint=str(pretrain_checkpoint),
        data=data,
        tokenizer_name=tokenizer_name,
        dry_run=dry_run,
    )
    if run.finished():
        return run.final
    checkpoint = inspect_checkpoint(pretrain_checkpoint)
    tokenizer, others = setup.choose_tokenizer(tokenizer_name, checkpoint, train_config)
    max_length = data.max_length or min(
        DEFAULT_MAX_LENGTH, checkpoint.positions or DEFAULT_MAX_LENGTH
    )
    setup.check_positions(max_length, checkpoint, "data.max_length")
    setup.check_agreement(tokenizer, others, data)
    with setup.outcome_recorded(runtime, run):
        prepared = setup.build_tables(
            runtime,
            run,
            lambda folder: build_instruction_tables(
                data,
                tokenizer,
                folder,
                max_length=max_length,
                max_prompt_length=data.max_prompt_length,
            ),
            train_config,
        )
        setup.check_ids_fit(prepared.train, checkpoint.vocabulary)
        scorer = setup.set_up_scorer(runtime, load_model(checkpoint), train_config, dropout=True)
        source, evaluation = setup.make_sources(runtime, train_config, prepared, "answers", scorer)
        task = LanguageTask(source, evaluation, scorer.aux_coefficient)
        facts = {"data": prepared.train.digest}
        ends = setup.answer_ends(tokenizer, data, prepared)
        return setup.train_and_export(
            runtime, scorer, task, train_config, run, tokenizer, facts, ends
        )
