"""The policy of a run, with LoRA adapters where they are configured."""

from __future__ import annotations

import torch

from modern_llm.config import LoraConfig, TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed.frozen_engine import read_rounded
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.adapters import add_adapters
from modern_llm.models.load import Checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.models.training_mode import disable_dropout
from modern_llm.models.unread import has_unread
from modern_llm.setup.scorers import load_base, load_to_shard, set_up_scorer


def check_lora(
    runtime: Runtime, lora: LoraConfig | None, config: TrainingConfig, *, dropout: bool
) -> None:
    """Refuse adapter options that cannot work here, before anything is loaded.

    Args:
        dropout: whether the stage has dropout at all.
    """
    if lora is None:
        return
    few = lora.quantize is not None
    rules = [
        (
            lora.dropout > 0 and not dropout,
            f"lora.dropout {lora.dropout}: DPO trains without dropout, so that policy and "
            "reference agree; remove it",
        ),
        (
            few and not torch.cuda.is_available(),
            f"lora.quantize {lora.quantize} needs a GPU and bitsandbytes: remove it on this "
            "machine",
        ),
        (
            few and runtime.stage == 3,
            f"lora.quantize {lora.quantize}: ZeRO-3 cannot shard weights of few bits; use "
            "accelerate_configs/zero2.yaml or ddp.yaml",
        ),
        (
            bool(lora.target_parameters) and runtime.stage == 3,
            "lora.target_parameters: ZeRO-3 shards the parameters that the adapters change; use "
            "accelerate_configs/zero2.yaml or ddp.yaml",
        ),
        (
            lora.dora and runtime.stage == 3,
            "lora.dora: ZeRO-3 shards the weights whose rows it measures; use "
            "accelerate_configs/zero2.yaml or ddp.yaml",
        ),
        (
            few and config.weights == "bfloat16",
            f"lora.quantize {lora.quantize}: the adapters are small and the other weights have "
            "few bits: set train.weights to float32",
        ),
        (
            few and config.precision == "no",
            f"lora.quantize {lora.quantize}: the forward runs in 16 bits; set "
            "train.mixed_precision to bf16 or fp16",
        ),
    ]
    problems = [text for broken, text in rules if broken]
    if problems:
        raise ConfigError(problems)


def set_up_policy(
    runtime: Runtime,
    checkpoint: Checkpoint,
    config: TrainingConfig,
    lora: LoraConfig | None,
    *,
    dropout: bool,
) -> TokenScorer:
    """Load the model to train, with adapters where configured."""
    rounded = lora is not None and _rounds_base(runtime, config, lora)
    if rounded:
        model = load_base(checkpoint)
    else:
        # DoRA measures the weights when its adapters are made.
        later = runtime.shards_weights and not (lora and lora.dora)
        model = load_to_shard(runtime, checkpoint, lora and lora.quantize, sharded=later)
    scorer = set_up_scorer(runtime, model, config, dropout=dropout)
    if lora is not None:
        add_adapters(model, lora, checkpoint.place, seed=config.seed)
        if rounded:
            read_rounded(model, config.precision, runtime.device)
        elif runtime.stage != 3 and not has_unread(model):
            model.to(runtime.device)
        if not dropout:
            disable_dropout(model)
    return scorer


def _rounds_base(runtime: Runtime, config: TrainingConfig, lora: LoraConfig) -> bool:
    """Whether the frozen linear layers are held in 16 bits, to which autocast rounds them."""
    # DoRA and adapters of parameters read the base in float32, beyond autocast.
    autocast = config.precision != "no" and lora.quantize is None
    alone = runtime.stage is None and not runtime.shards_weights
    return autocast and alone and not (lora.dora or lora.target_parameters)
