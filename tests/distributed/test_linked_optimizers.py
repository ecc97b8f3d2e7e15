"""bfloat16 weights with 16 bits beside them are stepped bit for bit as float32 weights are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modern_llm.distributed import linked_optimizers
from modern_llm.distributed.linked_optimizers import (
    LinkedOptimizers,
    SplitWeights,
    join_halves,
    make_masters,
    write_halves,
)


def halves(whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper = torch.empty_like(whole, dtype=torch.bfloat16)
    rest = torch.empty_like(whole, dtype=torch.int16)
    write_halves(upper, rest, whole)
    return upper, rest


def test_two_halves_are_the_number_bit_for_bit():
    torch.manual_seed(0)
    ends = torch.tensor([0.0, -0.0, 1.0, 3.3e38, -3.3e38, 1e-45, -1e-40, torch.inf, -torch.inf])
    # Upper halves with each lower half that rounding treats apart: ties, and their neighbours.
    lower = torch.tensor([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    upper = torch.tensor([0x3F80, 0x3F81, 0xBF80, 0xBF81], dtype=torch.int32)
    ties = ((upper[:, None] << 16) | lower).flatten().view(torch.float32)
    for whole in (ends, ties, torch.randn(10_000), torch.randn(999) * 1e-30):
        top, rest = halves(whole)
        assert torch.equal(join_halves(top, rest).view(torch.int32), whole.view(torch.int32))
        finite = whole.isfinite()
        near = (top.float() - whole)[finite].abs() <= (whole.bfloat16().float() - whole)[
            finite
        ].abs()
        assert bool(near.all()), "the upper half is the nearest bfloat16"
    assert bool(join_halves(*halves(torch.tensor([torch.nan]))).isnan())


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5, bias=False))


MAKERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-5, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-5),
    "two": lambda p: LinkedOptimizers(
        [torch.optim.Muon(p[:1], lr=1e-5), torch.optim.AdamW(p[1:], lr=1e-5)]
    ),
}


@pytest.mark.parametrize("bucket", [1, 200, 1 << 26])
@pytest.mark.parametrize("kind", MAKERS)
def test_updates_are_those_of_float32_weights(kind, bucket, monkeypatch):
    monkeypatch.setattr(linked_optimizers, "BUCKET", bucket)
    plain, split = model(), model()
    expected = MAKERS[kind](list(plain.parameters()))
    masters = make_masters(split)
    optimizer = SplitWeights(masters, MAKERS[kind](list(masters.values())))
    for step in range(20):
        torch.manual_seed(step)
        for group in (*expected.param_groups, *optimizer.param_groups):
            group["lr"] = 1e-6 * (step + 1)
        for a, b in zip(plain.parameters(), split.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        expected.step()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in split.parameters())
    for a, b in zip(plain.parameters(), split.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(join_halves(b.data, b.rest), a.data)
    # Without the other half nothing this small would have moved most weights.
    before = model()[0].weight.bfloat16()
    assert float((split[0].weight == before).float().mean()) > 0.5


def test_masters_hold_no_memory_between_steps():
    split = model()
    masters = make_masters(split)
    optimizer = SplitWeights(masters, MAKERS["adamw"](list(masters.values())))

    def held() -> int:
        return sum(m.data.untyped_storage().nbytes() for m in masters.values())

    assert held() == 4 * len(masters)
    split(torch.ones(2, 20, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in split.parameters())
    optimizer.step()
    assert held() == 4 * len(masters)
    assert [m.shape for m in masters.values()] == [p.shape for p in split.parameters()]


def test_gradients_are_summed_in_float32():
    """In bfloat16, 1 + 2**-9 is 1: the second micro-batch would be lost."""
    split = nn.Linear(1, 1, bias=False)
    make_masters(split)
    for value in (1.0, 2.0**-9):
        split(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert float(split.weight.grad) == 1 + 2.0**-9


def test_a_loaded_state_is_shared_by_the_parts():
    parameters = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    linked = MAKERS["two"](parameters)
    linked.load_state_dict(linked.state_dict())  # as Accelerate does
    linked.param_groups[0]["lr"] = 0.5
    assert linked.parts[0].param_groups[0]["lr"] == 0.5
    for parameter in parameters:
        parameter.grad = torch.ones(2, 2)
    linked.step()
    assert set(linked.state) == set(parameters)


def test_a_closure_is_refused():
    linked = LinkedOptimizers([MAKERS["adamw"]([nn.Parameter(torch.ones(2))])])
    with pytest.raises(ValueError, match="closure"):
        linked.step(lambda: 0.0)
