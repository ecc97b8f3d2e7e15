"""Frozen models beside the policy: whole on each device, or sharded by ZeRO-3 or FSDP2.

ZeRO-3 shards them under DeepSpeed at every stage of the policy. There is no optimizer and no
gradient, and every process holds its share of each weight. All processes must do the same number
of forwards.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from accelerate.utils.memory import clear_device_cache
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.distributed import deepspeed_config, deepspeed_release
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.sharded_start import (
    DTYPES,
    fill,
    shard_for_zero3,
    take_readers,
)

REFERENCE_FILE = "reference_zero3.json"


def engine_config(policy: dict[str, Any], file: str, config: TrainingConfig) -> dict[str, Any]:
    """Return the configuration of a frozen model's engine.

    Args:
        policy: the policy's resolved configuration.
        file: the policy's JSON file; `reference_zero3.json` beside it is used if it exists.
    """
    beside = Path(file).with_name(REFERENCE_FILE)
    if not beside.is_file():
        return deepspeed_config.reference_config(policy)
    content = deepspeed_config.read_file(str(beside))
    content["zero_optimization"] = {"stage": 3, **content.get("zero_optimization", {})}
    resolved = deepspeed_config.resolve(content, config, str(beside))
    return deepspeed_config.reference_config(resolved)


def shard(module: nn.Module, config: dict[str, Any], device: torch.device) -> nn.Module:
    """Return `module` in a ZeRO-3 engine for forwards only, with sharded weights."""
    import deepspeed

    freeze_parameters(module)
    shard_for_zero3(module, config, device)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


def shard_by_fsdp(accelerator: Accelerator, module: nn.Module, precision: str) -> nn.Module:
    """Return `module` sharded by FSDP2 as Accelerate shards the policy, for forwards only.

    Args:
        precision: of the run; 16-bit weights are sharded in 16 bits.
    """
    freeze_parameters(module)
    readers = take_readers(module, DTYPES.get(precision))
    if precision in DTYPES:
        round_parameters(module, precision)
    fsdp2_prepare_model(accelerator, module)
    fill(module, readers)
    return module


def freeze_parameters(module: nn.Module) -> nn.Module:
    """Switch dropout and gradients off."""
    module.requires_grad_(False)
    return module.eval()


def round_parameters(module: nn.Module, precision: str) -> None:
    """Convert the parameters to 16 bits; buffers, such as rotary tables, stay as they are."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[precision])


def _frozen_products(module: nn.Module) -> list[nn.Parameter]:
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    layers = [
        m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) not in tables
    ]
    weights = [p for m in layers for p in m.parameters(recurse=False) if not p.requires_grad]
    return [p for p in weights if p.dtype == torch.float32]


@torch.no_grad()
def read_rounded(module: nn.Module, precision: str, device: torch.device) -> None:
    """Read the placeholders of a model and move it to the device, one parameter at a time.

    Frozen weights of linear layers are kept in the 16 bits to which autocast rounds them anyway: no
    number changes, half of their memory is free, and neither host nor device ever holds a
    placeholder's weights in float32. Weights that are tied to an embedding stay: its rows are not
    rounded.
    """
    rounded = {id(p) for p in _frozen_products(module)} if precision in DTYPES else set()
    for parameter in module.parameters():
        heartbeat.tick()
        read = vars(parameter).pop("unread", None)
        kind = DTYPES[precision] if id(parameter) in rounded else parameter.dtype
        whole = parameter.data if read is None else read()
        # A copy: training would write into the mapped file's pages.
        parameter.data = whole.to(device, kind, copy=read is not None)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def release_frozen(frozen: nn.Module) -> None:
    """Free a frozen model's weights now, even if references to it remain."""
    if not hasattr(frozen, "destroy"):
        frozen.to("meta")
    else:
        deepspeed_release.destroy(frozen)
        for parameter in frozen.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype)
            parameter.ds_tensor = None
        gc.collect()
    clear_device_cache()
