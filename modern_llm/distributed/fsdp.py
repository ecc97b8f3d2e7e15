"""Precision of FSDP2: 16 bits in products, float32 in sums."""

from __future__ import annotations

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from modern_llm.config import TrainingConfig
from modern_llm.distributed.sharded_start import DTYPES


def plugin(config: TrainingConfig) -> FullyShardedDataParallelPlugin:
    """Return Accelerate's plugin with a precision of our own.

    Accelerate's default reduces gradients in 16 bits and rounds the outputs of the model to them.
    """
    policy = None
    if config.precision != "no":
        policy = MixedPrecisionPolicy(
            param_dtype=DTYPES[config.precision],
            reduce_dtype=torch.float32,
            output_dtype=torch.float32,
        )
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
