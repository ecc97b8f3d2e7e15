"""FlexAttention as a GPU gets it: which kernels its graphs use, how many graphs, which options."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from modern_llm.models.attention import flex
from tests.helpers.lowering import lowered_for_cuda

FUSED = ["flex_attention", "flex_attention_backward"]


@pytest.fixture
def fused():
    """The attention compiled as for CUDA; yields the names of the kernels that it uses."""
    flex.set_up_compiler()
    with lowered_for_cuda(flex._fused) as (compiled, kernels):
        with mock.patch.object(flex, "_fused", compiled):
            yield kernels


def train(heads, key_heads, width, length, window, softcap, dtype=torch.bfloat16):
    shapes = [(1, length, count, width) for count in (heads, key_heads, key_heads)]
    tensors = [torch.empty(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes]
    segments = torch.zeros(1, length, 2, dtype=torch.long)
    mask = flex.block_mask(segments, torch.arange(length)[None], window)
    out = flex.attend(*tensors, mask, 0.1, softcap, 0.0)
    assert out.shape == (1, heads, length, width)
    out.sum().backward()


def test_a_short_row_of_grouped_heads_lowers_to_the_fused_kernels(fused):
    train(64, 8, 128, 100, None, None)
    assert fused == FUSED


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (64, 8), (28, 4)])
def test_every_head_shape_lowers_forward_and_backward(heads, width, fused):
    variants = [(None, None), (64, None) if width == 64 else (512, 30.0)]
    for window, softcap in variants:
        for length in (33, 100, 1024):
            train(*heads, width, length, window, softcap)
    # Lengths share a graph; those that are a multiple of a block have one without bounds checks.
    assert fused == FUSED * 2 * len(variants)


@pytest.mark.slow
def test_the_limit_of_variants_is_raised_and_beyond_it_is_an_error(fused, monkeypatch):
    """Beyond its own limit torch would compute whole rows of scores without a fused kernel."""
    monkeypatch.setattr(flex, "VARIANTS", 2)
    # torch's own patch: monkeypatch would delete the setting for the rest of the process.
    with torch._dynamo.config.patch(recompile_limit=1):
        flex.set_up_compiler()
        for softcap in (20.0, 30.0):
            train(4, 2, 16, 128, None, softcap)
            train(4, 2, 16, 128, None, softcap)
        assert fused == FUSED * 2
        with pytest.raises(FailOnRecompileLimitHit):
            train(4, 2, 16, 128, None, 40.0)
