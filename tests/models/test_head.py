"""The fused head against plain float64 log-softmax, `gradcheck`, and the memory of one chunk."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modern_llm.models import head as head_module
from modern_llm.models.head import (
    CHUNK_BYTES,
    LEAST_CHUNK,
    LEAST_ROWS,
    FusedHead,
    LogitTransform,
    chunk_rows,
    free_memory,
    fuse_head,
    target_logprobs,
)

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(scale=0.3),
    LogitTransform(softcap=2.0),
    LogitTransform(scale=1.7, softcap=3.0),
]


def plain(hidden, weight, bias, targets, transform):
    logits = nn.functional.linear(hidden, weight, bias) * transform.scale
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def inputs(n=7, d=5, v=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, generator=g, dtype=dtype, requires_grad=True)
    bias = torch.randn(v, generator=g, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (n,), generator=g)
    return hidden, weight, bias, targets


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_values_and_gradients_equal_plain_log_softmax(transform, with_bias, rows):
    hidden, weight, bias, targets = inputs()
    bias = bias if with_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    upstream = torch.linspace(-2, 3, len(targets), dtype=torch.float64)

    ours = target_logprobs(hidden, weight, targets, bias=bias, transform=transform, rows=rows)
    expected = plain(hidden, weight, bias, targets, transform)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)

    for a, b in zip(
        torch.autograd.grad((ours * upstream).sum(), leaves),
        torch.autograd.grad((expected * upstream).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_head_makes_its_logits_once(transform, dtype):
    """Two products a chunk, the logits and the gradient of the states; recomputing takes three."""
    from torch.profiler import ProfilerActivity, profile

    hidden, weight, _, targets = (t.detach() for t in inputs(n=40, d=16, v=60))
    hidden, weight = (t.to(dtype) for t in (hidden / 4, weight / 4))
    hidden.requires_grad_()
    upstream = torch.linspace(-2, 3, len(targets), dtype=torch.float64)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours = target_logprobs(hidden, weight, targets, transform=transform, rows=10)
        (found,) = torch.autograd.grad((ours.double() * upstream).sum(), hidden)
    products = {event.key: event.count for event in seen.key_averages()}
    assert products["aten::mm"] == 2 * 4
    exact = hidden.detach().double().requires_grad_()
    expected = plain(exact, weight.double(), None, targets, transform)
    (gradient,) = torch.autograd.grad((expected * upstream).sum(), exact)
    bound = 1e-10 if dtype == torch.float64 else 3e-2
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), gradient, rtol=bound, atol=bound)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_gradcheck(transform):
    hidden, weight, bias, targets = inputs(n=4, d=3, v=6)
    assert torch.autograd.gradcheck(
        lambda h, w, b: target_logprobs(h, w, targets, bias=b, transform=transform, rows=3),
        (hidden, weight, bias),
    )


def test_bfloat16_input_gives_float32_close_to_float64():
    hidden, weight, _, targets = inputs(n=50, d=16, v=300)
    low = [t.detach().to(torch.bfloat16).requires_grad_() for t in (hidden, weight)]
    ours = target_logprobs(*low, targets, rows=8)
    assert ours.dtype == torch.float32
    expected = plain(low[0].double(), low[1].double(), None, targets, LogitTransform())
    # The product itself is rounded to bfloat16 (8 bits): logits of about 10 are off by up to 0.05.
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=0.1)
    ours.sum().backward()
    assert low[1].grad.dtype == torch.bfloat16
    assert torch.isfinite(low[1].grad).all()


def test_no_targets_gives_zero_gradients_and_keeps_the_graph():
    hidden, weight, bias, _ = inputs()
    out = target_logprobs(hidden[:0], weight, torch.zeros(0, dtype=torch.long), bias=bias)
    assert out.shape == (0,)
    out.sum().backward()
    assert weight.grad.abs().sum() == 0
    assert hidden.grad.abs().sum() == 0


def test_wrong_shapes_are_refused():
    hidden, weight, _, targets = inputs()
    with pytest.raises(ValueError, match="targets"):
        target_logprobs(hidden, weight, targets[:-1])


def test_peak_extra_memory_is_bounded_by_the_chunk():
    """Counts every live byte that torch allocates: full logits would be 64 times the bound."""
    from torch.profiler import ProfilerActivity, profile

    n, d, v, rows = 2048, 16, 4096, 16
    hidden = torch.randn(n, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    targets = torch.randint(v, (n,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        target_logprobs(hidden, weight, targets, rows=rows).sum().backward()
    live = peak = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    chunk = rows * v * 4
    results = (n * d + v * d + 4 * n) * 4
    assert peak > 0
    assert peak <= 4 * chunk + 2 * results
    assert 4 * chunk + 2 * results < n * v * 4 / 16


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.lm_head = nn.Linear(5, 11, bias=False)
        self.lm_head.weight = self.embedding.weight


def test_fuse_head_keeps_parameters_names_and_ties():
    model = Tied().double()
    before = dict(model.named_parameters())
    assert fuse_head(model.lm_head, LogitTransform())
    assert isinstance(model.lm_head, FusedHead)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert model.lm_head.weight is model.embedding.weight

    ids = torch.tensor([1, 4, 4, 9])
    targets = torch.tensor([2, 0, 10, 4])
    hidden = model.embedding(ids)
    ours = model.lm_head(hidden, targets)
    assert torch.equal(model.lm_head(hidden), nn.functional.linear(hidden, model.lm_head.weight))
    (grad,) = torch.autograd.grad(ours.sum(), model.embedding.weight)
    expected = plain(model.embedding(ids), model.embedding.weight, None, targets, LogitTransform())
    (wanted,) = torch.autograd.grad(expected.sum(), model.embedding.weight)
    torch.testing.assert_close(grad, wanted)


def test_a_head_that_is_not_a_linear_layer_is_not_changed():
    head = nn.Sequential(nn.Linear(5, 11))
    assert not fuse_head(head, LogitTransform())
    assert type(head) is nn.Sequential


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (140 << 30, CHUNK_BYTES["cuda"]),
        (3 << 30, 128 << 20),  # 192 MiB, rounded down to a power of two
        (1 << 30, 64 << 20),
        (100 << 20, LEAST_CHUNK),
        (0, LEAST_CHUNK),
    ],
)
def test_a_chunk_on_cuda_is_a_share_of_the_free_memory(free, expected, monkeypatch):
    device = torch.device("cuda", 0)
    # A third is free; the rest is PyTorch's unused reserve.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free // 4, 141 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: free - free // 4 + 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5)
    assert free_memory(device) == free
    found = expected // (32_000 * 4)
    assert chunk_rows(32_000, device, 2) == (found // 128 * 128 if found >= 128 else found)
    whole_tiles = {140 << 30: 1024, 3 << 30: 256, 1 << 30: 128, 100 << 20: 32, 0: 32}
    assert chunk_rows(128_256, device, 2) == whole_tiles[free]
    assert chunk_rows(1 << 40, device, 2) == 1, "at least one row"
    assert chunk_rows(4096, torch.device("cpu"), 4) == CHUNK_BYTES["cpu"] // (4096 * 4)
    assert chunk_rows(32_000, torch.device("cpu"), 4) == LEAST_ROWS["cpu"]


def test_the_gradient_of_a_float32_weight_is_not_rounded_under_autocast(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(50, (300,), generator=generator)
    found = []
    for fused in (False, True):
        # CPUs have no such operation: the test gives its result.
        monkeypatch.setattr(head_module, "sums_in_float32", lambda *of, f=fused: f)
        calls = []

        def addmm(total, left, right, dtype, *, out, calls=calls):
            calls.append(dtype)
            out.copy_(total + left.float() @ right.float())

        monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", addmm)
        with torch.autocast("cpu", torch.bfloat16):
            logprobs = target_logprobs(hidden, weight, targets, rows=64)
        (grad,) = torch.autograd.grad(logprobs.sum(), weight)
        assert grad.dtype == torch.float32
        assert calls == [torch.float32] * (5 if fused else 0)
        found.append(grad)
    assert not torch.equal(found[1], found[1].bfloat16().float())
    exact = (hidden.bfloat16().float(), weight.detach().bfloat16().float().requires_grad_())
    expected = (exact[0] @ exact[1].t()).log_softmax(-1).gather(-1, targets[:, None]).sum()
    (wanted,) = torch.autograd.grad(expected, exact[1])
    for grad in found:
        torch.testing.assert_close(grad, wanted, rtol=0, atol=0.1)
    assert (found[1] - wanted).norm() <= (found[0] - wanted).norm()


def test_a_sum_in_float32_is_measured():
    assert not head_module.sums_in_float32(torch.device("cpu"), torch.bfloat16)


def test_a_head_keeps_the_chunk_size_of_its_first_forward(monkeypatch):
    """Free memory changes during a run; the numbers of a step must not depend on it."""
    hidden, weight, bias, targets = inputs(n=40, dtype=torch.float32)
    asked = []
    sizes = iter([7, 3, 1, 1])
    monkeypatch.setattr(head_module, "chunk_rows", lambda *of: asked.append(of) or next(sizes))

    def trained(head):
        head.zero_grad()
        head(hidden, targets).sum().backward()
        return head.weight.grad.clone()

    torch.manual_seed(0)
    head = nn.Linear(5, 11)
    fuse_head(head, LogitTransform())
    with torch.no_grad():
        head(hidden, targets)  # like the probe, with all memory free
    first, again = trained(head), trained(head)
    assert (first == again).all() and head.rows == {False: 7, True: 3}
    assert asked == [(11, hidden.device, 4)] * 2
    fuse_head(head, LogitTransform())
    assert torch.allclose(trained(head), first, 1e-5, 1e-6), "another chunk size rounds differently"
    assert head.rows == {True: 1}
