"""Weights of few bits, simulated: products in bfloat16, outliers by batch, packed weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modern_llm.models.flops import IdealFlops
from modern_llm.models.load import make_scorer
from modern_llm.models.quantized import elements, product_dtype, shape_of
from modern_llm.models.training_mode import decoder_layers
from tests.helpers.models import make_model


class Linear4(nn.Linear):
    """As a layer of four bits: the product is in `compute_dtype`, the result in the input's."""

    compute_dtype = torch.bfloat16

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states.bfloat16(), self.weight.bfloat16()).to(states.dtype)


class Linear8(nn.Module):
    """As a layer of eight bits: columns above a threshold in any token of the batch are exact."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        scale = like.weight.detach().abs().amax(1, keepdim=True) / 127
        weight = (like.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        exact = (flat.abs() > 1.5 * flat.std()).any(0)
        scale = flat.masked_fill(exact, 0.0).abs().amax(1, keepdim=True) / 127
        rounded = (flat / scale).round() * scale
        mixed = torch.where(exact, flat, rounded)
        return (mixed @ (self.weight * self.scale).t()).view(*states.shape[:-1], -1)


def few_bits(kind: type) -> nn.Module:
    model = make_model("llama")
    for layer in decoder_layers(model):
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and kind is Linear4:
                    child.__class__ = Linear4
                elif type(child) is nn.Linear:
                    setattr(module, name, Linear8(child))
    return model


@pytest.mark.parametrize("kind", [Linear4, Linear8])
def test_trees_and_the_fused_head_are_kept(kind):
    model = few_bits(kind)
    assert model.dtype == torch.float32
    assert product_dtype(model, model.dtype) == torch.bfloat16
    capabilities = make_scorer(model, lean=False).capabilities
    assert capabilities.trees and capabilities.fused and capabilities.padded, capabilities.notes


def test_a_plain_model_keeps_the_tolerance_of_its_weights():
    assert product_dtype(make_model("llama"), torch.float32) == torch.float32


def test_packed_weights_count_with_their_real_size():
    model = make_model("llama").requires_grad_(False)
    expected = IdealFlops(model)
    for parameter in decoder_layers(model).parameters():
        if parameter.ndim == 2:
            shape = parameter.shape
            parameter.data = torch.zeros(parameter.numel() // 2, 1, dtype=torch.uint8)
            parameter.quant_state = SimpleNamespace(shape=shape)
            assert shape_of(parameter) == tuple(shape) and elements(parameter) == shape.numel()
    packed = IdealFlops(model)
    reach = torch.arange(1, 9)
    assert packed(reach, 4, training=True) == expected(reach, 4, training=True)
