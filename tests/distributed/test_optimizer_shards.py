"""Pieces of parameters that FSDP2 shards cover every parameter exactly once over the ranks.

Accelerate does not start FSDP2 without a GPU; the sharding itself is torch's and runs on CPUs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.ranks import run_ranks


def make() -> nn.Module:
    torch.manual_seed(3)
    # Rows that do not divide evenly between two ranks, and a bias.
    return nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 5, bias=False))


def step(model: nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    return optimizer


def on_a_rank() -> dict:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from modern_llm.distributed.engine import Engine
    from modern_llm.distributed.optimizer_shards import MOMENTS, full_parameters, pieces, replicated

    dist.init_process_group("gloo")
    model = fully_shard(make(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = step(model)
    with torch.no_grad():
        model(torch.ones(2, 6))  # an evaluation leaves whole weights in the outermost module
    engine = object.__new__(Engine)
    engine.model, engine.inner, engine.optimizer = model, model, optimizer
    found = {}
    for piece in pieces(engine):
        moments = [piece.moments(optimizer)[key].clone() for key in MOMENTS]
        found[piece.name] = piece.start, piece.weight.clone(), *moments
        piece.make_moments(optimizer, 5.0)
        assert float(optimizer.state[piece.owner]["step"]) == 5.0
    whole = {name: tensor.clone() for name, tensor in full_parameters(engine)}
    assert not replicated(engine)
    return {"pieces": found, "whole": whole, "world": dist.get_world_size()}


@pytest.mark.slow
def test_pieces_of_two_ranks_are_the_whole():
    plain = make()
    optimizer = step(plain)
    ranks = run_ranks(on_a_rank, 2)
    assert all(rank["world"] == 2 for rank in ranks)
    for name, parameter in plain.named_parameters():
        state = optimizer.state[parameter]
        wanted = [parameter.data, state["exp_avg"], state["exp_avg_sq"]]
        parts = sorted((rank["pieces"][name] for rank in ranks), key=lambda part: part[0])
        assert parts[0][0] == 0 and parts[1][0] == len(parts[0][1])
        for at, tensor in enumerate(wanted, 1):
            joined = torch.cat([part[at] for part in parts])
            assert torch.allclose(joined, tensor.flatten(), atol=1e-6), name
        for rank in ranks:
            assert torch.allclose(rank["whole"][name], parameter.data, atol=1e-6)
