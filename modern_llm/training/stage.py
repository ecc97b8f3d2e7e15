"""What the three stages share around the loop: names, tokenizer, data on disk, scorer, budgets,
export.

Each stage reads as the list of these steps in its own `train_*.py`; none of them imports another.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.data.encode.chat_template import Template, chat_template_of, end_tokens
from modern_llm.data.encode.tokenizer import check_tokenizers_agree, tokenizer_identity
from modern_llm.data.table.build import FELL_BACK, Prepared, sample_texts
from modern_llm.distributed.freed_memory import give_back_freed
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime, start
from modern_llm.export.final_model import export
from modern_llm.models.flops import peak_flops
from modern_llm.models.load import (
    Checkpoint,
    load_model,
    load_tokenizer,
    make_scorer,
    outside_note,
)
from modern_llm.models.scorer import TokenScorer
from modern_llm.models.training_mode import compile_layers, disable_dropout, recompute_activations
from modern_llm.training.checkpointing.saver import digest_of
from modern_llm.training.loop import train
from modern_llm.training.monitoring.diagnostics import learning_rate_warning
from modern_llm.training.monitoring.samples import make_sampler
from modern_llm.training.monitoring.trackers import check_trackers
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.summary import write_summary
from modern_llm.training.task import Task

log = logging.getLogger(__name__)


def record_of(**sections: Any) -> dict[str, Any]:
    """Return the configuration as plain values for `config.yaml`; sections that are None are left
    out."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in sections.items() if value is not None}


def with_dataset_name(data: DatasetConfig, config: TrainingConfig) -> DatasetConfig:
    """Return `data` with the name of its data set, which either section may say but not both
    differently."""
    if data.sources is not None:
        if config.dataset_name:
            raise ConfigError(
                ["train.dataset_name has no effect beside data.sources: remove one of them"]
            )
        return data
    if data.dataset_name and config.dataset_name and data.dataset_name != config.dataset_name:
        raise ConfigError(
            [
                f"data.dataset_name {data.dataset_name!r} and train.dataset_name "
                f"{config.dataset_name!r} "
                "name different data: remove one of them"
            ]
        )
    name = data.dataset_name or config.dataset_name
    if not name:
        raise ConfigError(
            ["data.dataset_name: no data set is named; give a Hub id, a file or a folder"]
        )
    return dataclasses.replace(data, dataset_name=name)


def open_run(
    config: TrainingConfig, dry_run: DryRun | None = None, **sections: Any
) -> tuple[Runtime, RunFolder]:
    """Start the processes and return them with the run's folder, which is refused if foreign.

    Args:
        dry_run: given where the run is only tried; its folder is then a temporary one.
        sections: what stands in `config.yaml` beside `train`; None is left out.
    """
    check_trackers(config)
    record = record_of(**sections, train=config)
    runtime = start(config, record)
    if config.batch_size < runtime.world:
        raise UserError(
            f"train.batch_size {config.batch_size} is below the {runtime.world} processes, so that "
            f"some would compute nothing in any step: use {runtime.world} or more, or at most "
            f"{config.batch_size} processes"
        )
    run = RunFolder(config, record)
    run.refuse_odd_files()
    if dry_run is None:
        runtime.on_main(lambda: run.finished() or run.lock.refuse_if_held())
    run.refuse_foreign()
    if dry_run is not None:
        return runtime, dry_run.aside(runtime, run)
    if run.finished():
        log.info("%s is finished already; remove %s to train again", config.run_name, run.path)
    return runtime, run


def choose_tokenizer(
    argument: str | None, checkpoint: Checkpoint | None, config: TrainingConfig
) -> tuple[PreTrainedTokenizerBase, list[tuple[str, PreTrainedTokenizerBase]]]:
    """Return the tokenizer to use, and the others that were named and must agree with it.

    The argument of `run_*` comes first, then the one in the checkpoint, then
    `train.tokenizer_name`.
    """
    candidates: list[tuple[str, str]] = []
    if argument:
        candidates.append(("the tokenizer_name argument", argument))
    if checkpoint is not None and checkpoint.has_tokenizer:
        candidates.append(("the checkpoint", checkpoint.place))
    if config.tokenizer_name:
        candidates.append(("train.tokenizer_name", config.tokenizer_name))
    if not candidates:
        raise ConfigError(
            ["train.tokenizer_name: the checkpoint holds no tokenizer and none is named; name one"]
        )
    (origin, place), *others = candidates
    tokenizer = load_tokenizer(place)
    log.info("tokenizer: %s (%s)", place, origin)
    if checkpoint is not None:
        note = outside_note(tokenizer, checkpoint.vocabulary)
        if note is not None:
            log.info("tokenizer: %s", note)
    loaded = [(other, load_tokenizer(other)) for _, other in others if other != place]
    return tokenizer, loaded


def check_agreement(
    tokenizer: PreTrainedTokenizerBase,
    others: list[tuple[str, PreTrainedTokenizerBase]],
    data: DatasetConfig,
) -> None:
    """Refuse tokenizers that are named beside the one in use and give other ids on this data."""
    texts = sample_texts(data) if others else []
    for _, other in others:
        check_tokenizers_agree(tokenizer, other, texts)


def check_positions(length: int, checkpoint: Checkpoint, setting: str) -> None:
    """Refuse sequences longer than the model has positions, or than its positions are stable."""
    positions = checkpoint.positions
    rope = getattr(checkpoint.config.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and length > original:
        raise UserError(
            f"{setting} {length} is above {original}, where this model changes its rotary scaling "
            "for a whole forward: a log-prob would depend on what is computed beside it; lower it"
        )
    if positions is not None and length > positions:
        raise UserError(
            f"{setting} {length} is above the {positions} positions that the model is made for: "
            "lower it"
        )


def set_up_scorer(
    runtime: Runtime, model: PreTrainedModel, config: TrainingConfig, *, dropout: bool
) -> TokenScorer:
    """Probe, wrap and place the model; dropout, recomputation and compilation as asked."""
    if runtime.stage != 3:  # there no device ever holds the whole model
        model.to(runtime.device)
    scorer = make_scorer(
        model,
        _attention(runtime, model, config),
        lean=_lean(runtime, config),
        router_loss=config.router_loss_coefficient,
        dropout=dropout,
    )
    _refuse_rows_alone(runtime, scorer)
    if runtime.is_main:
        rows = "one row an answer"
        if scorer.abilities.trees:
            rows = f"pairs share their prompt (attention: {scorer.abilities.backend})"
        log.info(
            "model: %s, %s parameters, %s",
            type(model).__name__,
            f"{model.num_parameters():,}",
            rows,
        )
    if config.gradient_checkpointing:
        recompute_activations(model, selective=config.gradient_checkpointing == "selective")
    if config.compile:
        compile_layers(model)
    return scorer


def _refuse_rows_alone(runtime: Runtime, scorer: TokenScorer) -> None:
    """Refuse weights sharded over processes for a model that takes a forward for each row: ranks
    with other numbers of rows would wait for each other."""
    if runtime.shards_weights and not scorer.abilities.padded:
        raise UserError(
            f"{type(scorer.model).__name__}: padding changes what this architecture computes, so "
            "each row has a forward of its own, which ZeRO-3 and FSDP cannot do; use "
            "accelerate_configs/zero2.yaml or ddp.yaml"
        )


def _lean(runtime: Runtime, config: TrainingConfig) -> bool:
    # A compiler fuses what `lean` does itself, and reads the model's own code best.
    return runtime.device.type == "cpu" and not config.compile


def _attention(runtime: Runtime, model: PreTrainedModel, config: TrainingConfig) -> str:
    """The configured attention; where the probe runs on another device than the training (ZeRO-3),
    the one backend that is the same on every device."""
    elsewhere = model.device.type != runtime.device.type
    return "mask" if elsewhere and config.attention in ("auto", "tree") else config.attention


def set_up_frozen(runtime: Runtime, checkpoint: Checkpoint, config: TrainingConfig) -> TokenScorer:
    """Load and probe a model that is only asked, never trained."""
    model = load_model(checkpoint, as_stored=runtime.rounds_weights)
    if runtime.stage is None:  # under DeepSpeed its engine places it, sharded
        model.to(runtime.device)
    disable_dropout(model)
    scorer = make_scorer(model, _attention(runtime, model, config), lean=_lean(runtime, config))
    _refuse_rows_alone(runtime, scorer)
    return scorer.eval().requires_grad_(False)


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
    shape.pop("output_router_logits", None)  # no matter of shape; older runs did not write it
    facts = {
        **facts,
        "model": digest_of({**shape, "transformers_version": None}),
        "tokenizer": tokenizer_identity(tokenizer),
    }
    peak, origin = peak_flops(runtime.device, config.precision)
    if runtime.is_main:
        log.info("mfu: of %.4g operations a second and process (%s)", peak, origin)
    engine = train(runtime, scorer, task, config, run, facts, sample, peak)
    runtime.on_main(run.lock.check)
    heartbeat.enter("writing the final model")
    give_back_freed()
    export(runtime, engine, tokenizer, run.final, ends)
    runtime.release(engine)
    heartbeat.enter("ending")
    if runtime.is_main:
        log.info("final model: %s", run.final)
    return run.final


def answer_ends(
    tokenizer: PreTrainedTokenizerBase, data: DatasetConfig, prepared: Prepared
) -> tuple[int | None, ...]:
    """Return the ids that end an answer in this data; the tokenizer gets the chat template in use.

    A template of the user's, or the one that stands in for a tokenizer without any, must travel
    with the model: prompts are to be written at generation as they were in training.
    """
    template = data.template
    log.info("template: %s", Template(tokenizer, template).describe())
    asked = template is not None and (template == "chat" or "{%" in template)
    if asked or FELL_BACK in prepared.report.notes:
        tokenizer.chat_template = chat_template_of(tokenizer, template) or tokenizer.chat_template
    if not tokenizer.chat_template:
        return (tokenizer.eos_token_id,)
    return end_tokens(tokenizer, Template(tokenizer, template, data.template_date))
