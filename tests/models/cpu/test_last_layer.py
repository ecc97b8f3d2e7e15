"""The last layer on needed states only, against the same model with all states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modern_llm.data.batch.order import Sharing
from modern_llm.models.attention.prefix_tree import TreeMasks
from modern_llm.models.cpu.last_layer import narrow_last_layer, narrows, needed_of
from modern_llm.models.load import make_scorer
from modern_llm.models.training_mode import decoder_layers, recompute_activations
from tests.helpers.models import CONFIGS, make_model, random_pairs, score

PAIRS = [(60, 9, 14), (40, 5, 3), (2, 1, 4)]
NARROWED = {"llama", "llama_tied", "qwen2", "qwen2_window", "qwen3", "mistral", "gemma2", "gemma3",
            "granite", "cohere"}  # fmt: skip


def seen_by(module: nn.Module) -> list[int]:
    """Record the lengths of the states that a projection gets."""
    lengths: list[int] = []
    module.register_forward_hook(
        lambda m, given, out: lengths.append(given[0].numel() // given[0].shape[-1])
    )
    return lengths


def sums_and_gradients(scorer):
    weights = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.0, 0.75]])
    sums, _ = score(scorer, random_pairs(PAIRS), shared=Sharing.LINE)
    (sums * weights).sum().backward()
    return sums.detach(), {n: p.grad for n, p in scorer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_values_and_gradients_are_those_of_the_whole_layer(name, recompute):
    expected, gradients = sums_and_gradients(make_scorer(make_model(name), lean=False))
    scorer = make_scorer(make_model(name))
    assert narrows(scorer.model) == (name in NARROWED)
    if name not in NARROWED:
        return
    if recompute:
        recompute_activations(scorer.model.train())
    last, before = (seen_by(decoder_layers(scorer.model)[at].mlp.up_proj) for at in (-1, -2))
    sums, ours = sums_and_gradients(scorer)
    # Below all 138 tokens; above the ends of three prompts and all but the last token of each
    # answer. With recomputation the forward runs twice.
    times = 2 if recompute else 1
    assert before == [sum(map(sum, PAIRS))] * times
    assert last == [3 + 8 + 13 + 4 + 2 + 0 + 3] * times
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-3)
    for n, gradient in ours.items():
        torch.testing.assert_close(
            gradient, gradients[n], rtol=1e-3, atol=2e-4, msg=lambda m, n=n: f"{n}: {m}"
        )


def test_parts_of_rows_without_a_needed_query_are_not_computed():
    segments = torch.zeros(1, 300, 2, dtype=torch.long)
    segments[0, 200:250, 1], segments[0, 250:, 1] = 1, 2
    positions = torch.arange(300)[None]
    masks = TreeMasks(segments, positions, torch.float32, "blocks")
    needed = needed_of(masks, torch.tensor([199, 260, 199]), segments.shape[:2])
    assert needed.states.tolist() == [199, 260]
    blocks = needed.masks[None]
    assert len(blocks) == 2 < len(masks[None])
    assert [b.start <= at < b.stop for b, at in zip(blocks, (199, 260), strict=True)] == [True] * 2


@pytest.mark.parametrize("sources", [[], list(range(90))])
def test_the_layer_is_not_narrowed_without_a_gain(sources):
    segments = torch.zeros(1, 100, 2, dtype=torch.long)
    masks = TreeMasks(segments, torch.arange(100)[None], torch.float32, "blocks")
    assert needed_of(masks, torch.tensor(sources, dtype=torch.long), segments.shape[:2]) is None


def test_a_feed_forward_that_mixes_tokens_is_not_patched():
    model = make_model("llama")
    mlp = decoder_layers(model)[-1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x.mean(-2, keepdim=True)
    assert not narrow_last_layer(model)
    assert not narrows(model)
