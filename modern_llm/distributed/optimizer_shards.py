"""This process's shard of the training state, as pieces of flat parameters, for every engine.

A `Piece` is a range of one parameter with its float32 weights and AdamW moments. Under ZeRO every
rank holds different pieces; otherwise every rank holds all parameters whole. Checkpoints consist of
pieces, so that a run can resume under another stage or number of processes. DeepSpeed's flat
buffers are not public API: the tests read every piece back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from modern_llm.distributed.engine import DeepSpeedEngine, Engine, innermost
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.linked_optimizers import join_halves, write_halves

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A range of one parameter on this rank."""

    name: str
    """The parameter's name in the module before it was prepared."""
    start: int
    """First element, as an index into the flattened parameter."""
    data: Tensor
    """(n,) weights of this range, in the dtype in which they are kept."""
    owner: Tensor
    """The optimizer's parameter: this one, or a flat buffer of many."""
    offset: int
    """First element, as an index into the flattened `owner`."""
    rest: Tensor | None = None
    """(n,) int16 halves of the weights, where `data` is the other, see `SplitWeights`."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of `weight`."""
        return self.data.dtype if self.rest is None else torch.float32

    @property
    def weight(self) -> Tensor:
        """(n,) weights that the optimizer updates: float32, even if the forward uses 16 bits.

        A copy on the host where they are kept in halves: all of them in float32 may not fit on the
        device.
        """
        return self.data if self.rest is None else join_halves(self.data.cpu(), self.rest.cpu())

    def set_weight(self, weights: Tensor) -> None:
        """Set the weights that the optimizer updates to float32 `weights` (n,)."""
        if self.rest is None:
            self.data.copy_(weights)
        else:
            write_halves(self.data, self.rest, weights.to(self.data.device))

    def moments(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the tensors of the optimizer's state by key; empty before the first step.

        Those with one number for each weight are (n,) views. Others, such as the sums of rows of
        Adafactor, keep their shape; then this piece is a whole parameter.
        """
        found = {}
        size = _local(self.owner).numel()
        for key, value in optimizer.state.get(self.owner, {}).items():
            if key == "step" or not isinstance(value, Tensor):
                continue
            local = _local(value)
            if local.numel() == size:
                local = local.view(-1)[self.offset : self.offset + self.data.numel()]
            found[key] = local
        return found

    def count(self, optimizer: torch.optim.Optimizer) -> Tensor | None:
        """Return the number of steps: () float32, or int64 if the optimizer has a plain int."""
        step = optimizer.state.get(self.owner, {}).get("step")
        if step is None:
            return None
        return torch.tensor(step if isinstance(step, int) else float(step))

    def make_moments(self, optimizer: torch.optim.Optimizer, step: float) -> None:
        """Create missing moments of AdamW for the owner as zeros, and set its step count."""
        state = optimizer.state[self.owner]
        for key in MOMENTS:
            if key not in state:
                state[key] = torch.zeros_like(self.owner.data).contiguous()
        state["step"] = torch.tensor(step, dtype=torch.float32, device=self.owner.device)

    def restore(self, optimizer: torch.optim.Optimizer, stored: dict[str, Tensor]) -> None:
        """Set the state of a whole parameter to what `moments` and `count` returned."""
        state = optimizer.state[self.owner]
        for key, value in stored.items():
            if key == "step" and not value.is_floating_point():
                state[key] = int(value)
                continue
            value = value.to(self.owner.device, copy=True)
            fits = key != "step" and value.numel() == self.owner.numel()
            state[key] = value.view(self.owner.shape) if fits else value


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return the optimizer inside all wrappers, whose state holds the moments."""
    return innermost(engine.optimizer)


def pieces(engine: Engine) -> list[Piece]:
    """Return this rank's pieces of the trained parameters."""
    if isinstance(engine, DeepSpeedEngine) and engine.stage == 3:
        return list(_stage_3(engine))
    if isinstance(engine, DeepSpeedEngine) and engine.stage > 0:
        return list(_stage_1_and_2(engine))
    engine.reshard()
    return [
        _whole(name, parameter)
        for name, parameter in engine.inner.named_parameters()
        if parameter.requires_grad
    ]


def _whole(name: str, parameter: nn.Parameter) -> Piece:
    """Return a parameter, or FSDP2's shard of it, as a piece."""
    data = _local(parameter).view(-1)
    if hasattr(parameter, "rest"):
        return Piece(name, 0, data, parameter.master, 0, parameter.rest.view(-1))
    return Piece(name, _first_element(parameter), data, parameter, 0)


def replicated(engine: Engine) -> bool:
    """Whether every rank holds all pieces, so that one rank can write them."""
    if isinstance(engine, DeepSpeedEngine):
        return engine.stage == 0
    engine.reshard()
    return not any(hasattr(parameter, "to_local") for parameter in engine.inner.parameters())


def full_parameters(engine: Engine, *, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole float32 parameter) one at a time; a collective.

    Args:
        trained: yield only trained parameters.
    """
    names = {id(p): name for name, p in engine.inner.named_parameters()}
    sharded = isinstance(engine, DeepSpeedEngine) and engine.stage > 0
    for parameter in engine.inner.parameters():
        heartbeat.tick()
        name = names[id(parameter)]
        if trained and not parameter.requires_grad:
            continue
        if sharded and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            yield name, safe_get_full_fp32_param(parameter).view(_shape(parameter))
        elif hasattr(parameter, "ds_id"):  # frozen, and sharded by ZeRO-3
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach().clone().float()
        elif hasattr(parameter, "full_tensor"):  # sharded by FSDP2
            yield name, parameter.full_tensor().detach()
        elif hasattr(parameter, "rest"):
            yield name, join_halves(parameter.detach(), parameter.rest)
        else:
            yield name, parameter.detach()


def _local(tensor: Tensor) -> Tensor:
    """Return the tensor's data; of a DTensor (FSDP2) this rank's shard."""
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.data


def _first_element(parameter: nn.Parameter) -> int:
    """Return the first element of this rank's shard; FSDP2 shards along rows."""
    if not hasattr(parameter, "to_local"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0] * (parameter.numel() // parameter.shape[0])


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _stage_1_and_2(engine: DeepSpeedEngine) -> Iterator[Piece]:
    sharded = engine.optimizer
    flat_of_group = sharded.single_partition_of_fp32_groups
    names = {id(p): name for name, p in engine.inner.named_parameters()}
    for group, flat in zip(sharded.bit16_groups, flat_of_group, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it is on other ranks
                continue
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Piece(
                names[id(parameter)],
                there.start,
                flat.data[here.start : here.start + here.numel],
                flat,
                here.start,
            )


def _stage_3(engine: DeepSpeedEngine) -> Iterator[Piece]:
    sharded = engine.optimizer
    names = {id(p): name for name, p in engine.inner.named_parameters()}
    rank = dist.get_rank()
    for group in sharded.fp16_groups:
        for parameter in group:
            index, offset, numel = sharded.grad_position[sharded.get_param_id(parameter)]
            flat = sharded.fp32_partitioned_groups_flat[index]
            start = numel * rank
            # Partitions have equal size: elements after the parameter's end are padding.
            real = min(numel, parameter.ds_numel - start)
            if real > 0:
                yield Piece(
                    names[id(parameter)], start, flat.data[offset : offset + real], flat, offset
                )
