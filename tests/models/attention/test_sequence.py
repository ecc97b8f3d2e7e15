"""Rows split over a group compute what one process computes: log-probs, gradients, router loss.

The processes are threads with a copy of the model each.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from modern_llm.config.errors import UserError
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.attention.sequence import repeats
from modern_llm.models.load import make_scorer
from modern_llm.models.row_split import check_split
from modern_llm.models.scorer import Capabilities, TokenScorer
from modern_llm.planning.communication import exchanged_bytes
from modern_llm.planning.memory import ParallelLayout, Sizes
from tests.helpers.models import make_model, random_pairs

FAMILIES = ("llama_tied", "qwen2_window", "qwen3", "gemma2", "gemma3", "gpt2", "phi3", "cohere")
SIZES = [(9, 30, 5), (2, 17, 11), (31, 3, 8), (1, 2, 1)]


class Meeting:
    """Where `size` threads exchange tensors."""

    def __init__(self, size: int):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.kept: list = [None] * size

    def all(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self.kept[rank] = value
        self.barrier.wait()
        found = list(self.kept)
        self.barrier.wait()
        return found


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, rank, meeting):
        ctx.at = rank, meeting
        return torch.stack([theirs[rank] for theirs in meeting.all(rank, parts)])

    @staticmethod
    def backward(ctx, grad):
        rank, meeting = ctx.at
        return torch.stack([theirs[rank] for theirs in meeting.all(rank, grad)]), None, None


class Thread:
    """The `SequenceGroup` of one thread."""

    def __init__(self, rank: int, meeting: Meeting):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting
        self.sent = 0

    def exchange(self, parts):
        self.sent += parts.numel()
        return Exchange.apply(parts, self.rank, self._meeting)

    def sum(self, values):
        return sum(self._meeting.all(self.rank, values.detach().clone()))


def on_threads(size: int, work):
    """Return `work(rank, group)` of every thread."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(rank, Thread(rank, meeting)), range(size)))


def batch_of(scorer, shared: Sharing):
    table = random_pairs(SIZES)
    return collate(Examples(table, trees=True), np.arange(len(table)), shared=shared)


def result(scorer, batch, weights):
    """Return log-probs, router loss and gradients of a weighted sum of both."""
    output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
    loss = (output.logprobs * weights).sum()
    if output.aux_loss is not None:
        loss = loss + 3 * output.aux_loss
    loss.backward()
    grads = {n: p.grad for n, p in scorer.named_parameters() if p.grad is not None}
    return output.logprobs.detach(), output.aux_loss, grads


def compare(scorer, sizes, shared=Sharing.LINE):
    batch = batch_of(scorer, shared)
    weights = torch.linspace(-1, 1, batch.targets.shape[1])
    plain = copy.deepcopy(scorer)
    plain.narrows = False
    expected, aux, grads = result(plain, batch, weights)
    for size in sizes:

        def work(rank, group):
            model = copy.deepcopy(scorer.model)
            mine = TokenScorer(model, scorer.capabilities, scorer._router_loss, group)
            mine.log_squares = scorer.log_squares
            return result(mine, batch, weights), group

        found = on_threads(size, work)
        for (logprobs, one, _), group in found:
            torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)
            assert group.sent == elements_sent(scorer.model.config, batch, size)
            if aux is not None:
                torch.testing.assert_close(one, aux)
        for name, grad in grads.items():
            total = sum(mine[name] for (_, _, mine), _ in found)
            torch.testing.assert_close(total, grad, rtol=1e-4, atol=2e-4, msg=name)


def elements_sent(config, batch, size: int) -> int:
    """What a plan counts for a forward, the part that a process keeps included."""
    rows, length = batch.ids.shape
    sizes = Sizes(
        config.num_hidden_layers, 0, 0, config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, 0,
    )  # fmt: skip
    tokens = rows * -(-length // size)
    layout = ParallelLayout(sequence_parallel=size, tokens=tokens)
    return exchanged_bytes(sizes, layout) * size // (size - 1) // 4 * sizes.layers


@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_the_same_values_and_gradients(name):
    compare(make_scorer(make_model(name)), (2, 4))


@pytest.mark.parametrize("backend", ["mask", "blocks"])
def test_both_backends_and_several_rows(backend):
    scorer = make_scorer(make_model("llama"), backend)
    compare(scorer, (4,), Sharing.ROWS)


def test_experts_and_their_router_loss():
    compare(make_scorer(make_model("mixtral"), router_loss=0.1), (2,))


def test_key_heads_are_repeated_only_as_far_as_needed():
    heads = {(2, 2): 1, (2, 4): 2, (8, 4): 1, (1, 8): 8, (6, 4): 2}
    assert {case: repeats(*case) for case in heads} == heads


def refused(model, size: int) -> list[str]:
    def work(rank, group):
        try:
            make_scorer(copy.deepcopy(model), sequence=group)
        except UserError as error:
            return str(error)
        return ""

    return on_threads(size, work)


def test_a_model_that_cannot_is_refused_at_load():
    (first, _, _) = refused(make_model("llama"), 3)
    assert "has 4 attention heads, which 3 processes cannot share evenly" in first
    subject = SimpleNamespace(model=make_model("mamba"))
    capabilities = Capabilities(trees=False, fused=True)
    with pytest.raises(UserError, match="without the tree attention, .* use 1 .separate rows: no"):
        check_split([subject], capabilities, ["separate rows: no"], Thread(0, Meeting(2)))
    check_split([subject], capabilities, [], None)
    capabilities = Capabilities(trees=True, fused=True, mixers=("MambaMixer",))
    with pytest.raises(UserError, match="has layers with a state .MambaMixer., .* use 1"):
        check_split([subject], capabilities, [], Thread(0, Meeting(2)))


def test_a_layer_that_looks_at_other_tokens_is_found():
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    real = mlp.forward
    mlp.forward = lambda x: real(x) + 0.1 * torch.arange(x.shape[1])[None, :, None]
    assert all("cannot" in line or "without" in line for line in refused(model, 2))
