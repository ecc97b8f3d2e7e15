"""Under FSDP2 a forward sees the reference's weights while they are in place, and only then.

Accelerate does not start FSDP2 without a GPU; the sharding itself is torch's and runs on CPUs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modern_llm.config.errors import Stopped
from modern_llm.distributed.engine import Engine
from modern_llm.reference.moving_weights import MovingWeights
from tests.helpers.ranks import run_ranks


def make(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    # Rows that do not divide evenly between two ranks, and a bias.
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5, bias=False))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.ones(2, 6)).clone()


def on_a_rank() -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh, policy = init_device_mesh("cpu", (2,)), make(3)
    fully_shard(policy[0], mesh=mesh)
    engine = object.__new__(Engine)
    engine.model = engine.inner = fully_shard(policy, mesh=mesh)
    moving = MovingWeights()
    moving.copy(engine)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    found = {"policy": outputs(policy)}  # leaves gathered weights in the outermost module
    with moving.in_place(engine):
        found["first"] = outputs(policy)
    found["again"] = outputs(policy)
    moving.mix(engine, 0.6)
    try:
        with moving.in_place(engine):
            found["mixed"] = outputs(policy)
            raise Stopped("SIGTERM")
    except Stopped:
        found["stopped"] = outputs(policy)
    return found


@pytest.mark.slow
def test_two_ranks_swap_and_mix_their_shards():
    plain, first = make(3), make(3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    mixed = make(3)
    with torch.no_grad():
        for old, new in zip(mixed.parameters(), plain.parameters(), strict=True):
            old.mul_(0.4).add_(new, alpha=0.6)
    for found in run_ranks(on_a_rank, 2):
        assert torch.equal(found["policy"], found["again"])
        assert torch.equal(found["policy"], found["stopped"])
        for name, model in {"policy": plain, "first": first, "mixed": mixed}.items():
            assert torch.allclose(found[name], outputs(model), atol=1e-6), name
        assert not torch.allclose(found["policy"], found["mixed"], atol=1e-3)
