"""Start of sharded weights: each parameter is read whole, sharded, and freed before the next.

By itself DeepSpeed's engine moves the whole module to each device first, and every process reads
all of it. Here rank 0 reads and the others receive, one parameter at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from modern_llm.distributed.freed_memory import large_blocks_apart
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.heartbeat import waiting

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@large_blocks_apart()
@torch.no_grad()
def shard_for_zero3(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """Shard the parameters of `module` as ZeRO-3 does, and move its buffers; a collective.

    Args:
        module: its parameters have weights, or an attribute `unread` that reads them.
        config: DeepSpeed's configuration, with the precision of forwards.
    """
    import deepspeed

    config = copy.deepcopy(config)
    dtype = forward_dtype(config)
    first: nn.Parameter | None = None
    for parameter in list(module.parameters()):
        heartbeat.tick()
        parameter.data = _whole(parameter, dtype, device)
        with waiting():
            if first is None:
                holder = nn.Module()
                holder.weight = first = parameter
                deepspeed.zero.Init(module=holder, config_dict_or_path=config)
            else:  # a method that `Init` has put on the first one
                first.convert_to_zero_parameters(param_list=[parameter])
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def forward_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the weights of forwards under a DeepSpeed configuration."""
    for name, dtype in DTYPES.items():
        if config.get(name, {}).get("enabled"):
            return dtype
    return torch.float32


def _whole(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the whole weights on the device; on other ranks than 0 maybe uninitialised ones, which
    the next collective fills."""
    read = vars(parameter).pop("unread", None)
    kind = dtype if parameter.is_floating_point() else parameter.dtype
    if read is not None and dist.get_rank() != 0:
        return torch.empty(parameter.shape, dtype=kind, device=device)
    # Always a copy: mapped pages that a collective writes to would stay in memory with the file.
    return (parameter.data if read is None else read()).to(device, kind, copy=True).contiguous()


@torch.no_grad()
def take_readers(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Callable]:
    """Return what reads each parameter by name, and let FSDP2 shard uninitialised ones meanwhile.

    Args:
        dtype: of the parameters; default: unchanged.
    """
    readers = {}
    for name, parameter in module.named_parameters():
        if read := vars(parameter).pop("unread", None):
            readers[name] = read
            # Contiguous, as FSDP2 demands. Its pages are never written, so it takes no memory.
            parameter.data = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
    return readers


@large_blocks_apart()
@torch.no_grad()
def fill(module: nn.Module, readers: dict[str, Callable]) -> None:
    """Fill the parameters that FSDP2 has sharded, one after another; a collective."""
    parameters = dict(module.named_parameters())
    for name, read in readers.items():
        heartbeat.tick()
        parameter = parameters[name]
        mesh = parameter.device_mesh
        if dist.get_rank() == 0:
            whole = read().to(mesh.device_type, parameter.dtype).contiguous()
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
        with waiting():
            part = distribute_tensor(whole, mesh, parameter.placements)  # rank 0 scatters
        parameter.to_local().copy_(part.to_local())


def refuse_unread(module: nn.Module) -> None:
    """Raise an error if a parameter has no weights: it would compute with zeros."""
    names = [name for name, parameter in module.named_parameters() if hasattr(parameter, "unread")]
    if names:
        raise AssertionError(f"{names[0]} has no weights: its engine does not read them")
