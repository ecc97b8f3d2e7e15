"""Policy and frozen scorers: probed, placed on the device, with or without dropout."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line
from modern_llm.distributed.freed_memory import large_blocks_apart
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.chunked_mlp import chunk_feed_forward
from modern_llm.models.load import Checkpoint, load_model, make_scorer
from modern_llm.models.load_later import CannotWait, load_model_later
from modern_llm.models.scorer import TokenScorer
from modern_llm.models.training_mode import (
    compile_layers,
    disable_dropout,
    recompute_activations,
)
from modern_llm.models.unread import first_layers, has_unread

log = logging.getLogger(__name__)


def check_model(config: TrainingConfig, checkpoint: Checkpoint, length: int, setting: str) -> None:
    """Refuse a model that this run cannot use, before its weights are read.

    Args:
        length: most tokens of a sequence, which `setting` names.
    """
    check_split(config, checkpoint.config)
    check_positions(length, checkpoint, setting)


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


def check_split(config: TrainingConfig, model: PretrainedConfig) -> None:
    """Refuse `train.sequence_parallel` for a model whose configuration shows that it cannot work.

    What the configuration does not show, the probe finds.
    """
    parts, text = config.sequence_parallel, model.get_text_config()
    if parts == 1:
        return
    place = f"train.sequence_parallel {parts}: the model ({model.model_type})"
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads % parts:
        raise UserError(
            f"{place} has {heads} attention heads, which {parts} processes cannot share evenly: "
            "use a divisor"
        )
    kinds = set(map(str, getattr(text, "layer_types", None) or ()))
    states = sorted(k for k in kinds if "attention" not in k or "linear" in k)
    if states:
        raise UserError(
            f"{place} has {states[0]} layers, which read a row from its start to its end: use 1"
        )


def load_to_shard(
    runtime: Runtime, checkpoint: Checkpoint, quantize: str | None = None, *, sharded: bool
) -> PreTrainedModel:
    """Load a model; if its weights will be `sharded`, they are read then, one after another.

    Args:
        quantize: see `load_model`.
    """
    if sharded and quantize is None:
        try:
            return load_model_later(checkpoint)
        except CannotWait as reason:
            if runtime.is_main:
                log.warning(
                    "warning: checkpoint %s: every process reads the whole model before it is "
                    "sharded, because %s",
                    checkpoint.place,
                    reason,
                )
    return load_model(checkpoint, quantize, as_stored=sharded and runtime.rounds_weights)


def load_base(checkpoint: Checkpoint) -> PreTrainedModel:
    """Load a model that will be frozen in 16 bits; where possible its weights are read then."""
    try:
        return load_model_later(checkpoint)
    except CannotWait as reason:
        log.info("checkpoint %s: held in float32 at first, because %s", checkpoint.place, reason)
        return load_model(checkpoint)


def set_up_scorer(
    runtime: Runtime, model: PreTrainedModel, config: TrainingConfig, *, dropout: bool
) -> TokenScorer:
    """Probe, wrap and place the model; apply dropout, recomputation and compilation settings."""
    if runtime.stage != 3 and not has_unread(model):
        model.to(runtime.device)
    _set_kernel(model, config)
    scorer = _probed(
        runtime, model, config, router_loss=config.router_loss_coefficient, dropout=dropout
    )
    _refuse_rows_alone(runtime, scorer)
    if runtime.is_main:
        rows = "one row an answer"
        if scorer.capabilities.trees:
            rows = f"pairs share their prompt (attention: {scorer.capabilities.backend})"
        log.info(
            "model: %s, %s parameters, %s",
            type(model).__name__,
            f"{model.num_parameters():,}",
            rows,
        )
    _chunk(model, config)
    if config.gradient_checkpointing:
        mode = config.gradient_checkpointing
        recompute_activations(model, selective=mode == "selective", offload=mode == "offload")
    if config.compile:
        compile_layers(model)
    return scorer


def _chunk(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Split the feed-forward layers' rows where `train.mlp_chunk` says so."""
    if config.mlp_chunk is not None:
        measured = first_layers(model) if has_unread(model) else None
        chunk_feed_forward(model, config.mlp_chunk, measured)


def _probed(
    runtime: Runtime, model: PreTrainedModel, config: TrainingConfig, **options: Any
) -> TokenScorer:
    """Probe and wrap a model, or its first layers if its weights are not read yet."""
    options |= {
        "attention": config.attention,
        "lean": _lean(runtime, config),
        "device": runtime.device,
        "dtype": runtime.attention_dtype,
        "sequence": runtime.sequence,
    }
    if not has_unread(model):
        return make_scorer(model, **options)
    with large_blocks_apart():
        return make_scorer(model, measured=first_layers(model), **options)


def _refuse_rows_alone(runtime: Runtime, scorer: TokenScorer) -> None:
    """Refuse sharded weights for a model that needs one forward per row.

    Ranks with different numbers of rows would wait for each other.
    """
    if runtime.shards_weights and not scorer.capabilities.padded:
        raise UserError(
            f"{type(scorer.model).__name__}: padding changes what this architecture computes, so "
            "each row has a forward of its own, which ZeRO-3 and FSDP cannot do; use "
            "accelerate_configs/zero2.yaml or ddp.yaml"
        )


def _set_kernel(model: PreTrainedModel, config: TrainingConfig) -> None:
    """Set the configured attention kernel of the model; the probe then measures with it."""
    name = config.attn_implementation
    if name is None:
        return
    try:
        model.set_attn_implementation(name)
        reason = "its attention is of its own"
    except Exception as error:  # the model's code may raise anything
        reason = first_line(error)
    if model.config._attn_implementation != name:
        raise UserError(
            f"train.attn_implementation {name}: {type(model).__name__} does not take it "
            f"({reason}): choose the other, or leave it out"
        )


def _lean(runtime: Runtime, config: TrainingConfig) -> bool:
    # A compiler does the fusions of `lean` itself, best from the model's own code.
    return runtime.device.type == "cpu" and not config.compile


def set_up_frozen(runtime: Runtime, checkpoint: Checkpoint, config: TrainingConfig) -> TokenScorer:
    """Load and probe a frozen model."""
    check_split(config, checkpoint.config)
    model = load_to_shard(runtime, checkpoint, sharded=runtime.shards_frozen)
    if not runtime.shards_frozen:  # else its engine places it
        model.to(runtime.device)
    disable_dropout(model)
    _set_kernel(model, config)
    scorer = _probed(runtime, model, config)
    _refuse_rows_alone(runtime, scorer)
    _chunk(model, config)
    return scorer.eval().requires_grad_(False)
