"""Feed-forward layers in pieces of tokens: the same values and gradients, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modern_llm.config.errors import UserError
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.chunked_mlp import chunk_feed_forward, token_wise
from modern_llm.models.load import make_scorer
from modern_llm.models.training_mode import (
    decoder_layers,
    disable_dropout,
    recompute_activations,
)
from tests.helpers.models import CONFIGS, make_model, random_pairs


def sums_and_gradients(scorer):
    table = random_pairs([(9, 14, 5), (3, 8, 11)])
    shared = Sharing.ROWS if scorer.capabilities.trees else Sharing.ALONE
    examples = Examples(table, trees=scorer.capabilities.trees)
    batch = collate(examples, torch.arange(2).numpy(), shared=shared)
    output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
    sums = batch.sums(output.logprobs)
    sums.mul(torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=sums.dtype)).sum().backward()
    return sums.detach(), {n: p.grad for n, p in scorer.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("mixtral", "mamba")])
def test_values_and_gradients_are_those_of_whole_rows(name, recompute):
    plain, split = (make_scorer(make_model(name, torch.float64)) for _ in range(2))
    assert chunk_feed_forward(split.model, 5) == len(decoder_layers(split.model))
    expected, gradients = sums_and_gradients(plain)
    if recompute:
        recompute_activations(split.model)
    disable_dropout(split.model)
    split.train()
    sums, ours = sums_and_gradients(split)
    torch.testing.assert_close(sums, expected, rtol=1e-11, atol=1e-10)
    assert set(ours) == set(gradients)
    for n, gradient in ours.items():
        torch.testing.assert_close(
            gradient, gradients[n], rtol=1e-9, atol=1e-9, msg=lambda m, n=n: f"{n}: {m}"
        )


def test_the_inner_products_exist_for_one_piece_at_a_time():
    """Of every layer, the narrow last one included."""
    widest: list[int] = []
    scorer = make_scorer(make_model("llama"))
    layers = decoder_layers(scorer.model)
    for layer in layers:
        layer.mlp.gate_proj.register_forward_hook(
            lambda module, args, out: widest.append(out[..., 0].numel())
        )
    sums_and_gradients(scorer)
    assert max(widest) > 30
    widest.clear()
    chunk_feed_forward(scorer.model, 7)
    kept: list[int] = []
    inner = layers[0].mlp.gate_proj.out_features
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape[-1]) or tensor, lambda tensor: tensor
    ):
        sums_and_gradients(scorer)
    assert max(widest) == 7
    assert inner not in kept, "an inner product is kept for the backward"


def test_attention_and_mixers_are_not_token_wise():
    layer = decoder_layers(make_model("llama"))[0]
    assert token_wise(layer) == ["mlp"]

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return self.outer(self.inner(x).cumsum(1))

    holder = nn.Module()
    holder.mixer = Mean()
    assert token_wise(holder) == []


def test_models_with_experts_are_refused_in_one_line():
    model = make_model("mixtral")
    with pytest.raises(UserError, match="MixtralForCausalLM has experts"):
        chunk_feed_forward(model, 8)
