"""Log-probs survive wrappers that cast outputs to bfloat16, and so do their gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._pytree import tree_map

from modern_llm.models.exact_parts import join, split
from modern_llm.models.load import make_scorer
from tests.helpers.models import make_model, random_pairs, score


class Casting(nn.Module):
    """Casts the floating outputs of a module, as FSDP with `output_dtype=bfloat16` does."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.capabilities = inner.capabilities

    def forward(self, *inputs):
        def cast(value):
            narrow = isinstance(value, torch.Tensor) and value.is_floating_point()
            return value.bfloat16() if narrow else value

        return tree_map(cast, self.inner(*inputs))


def test_values_of_every_size_are_the_exact_sum_of_their_parts():
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.arange(-20, 20).repeat_interleave(50)
    values = torch.randn(len(sizes), generator=generator) * sizes
    special = torch.tensor([0.0, -2118.95, float("-inf"), float("inf"), float("nan")])
    values = torch.cat([values, special])
    parts = split(values)
    assert parts.shape == (3, len(values))
    for found in (join(parts), join(parts.bfloat16())):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, values, rtol=0, atol=0, equal_nan=True)
    wide = torch.randn(100, dtype=torch.float64, generator=generator)
    assert torch.equal(join(split(wide)), wide)


def test_a_wrapper_that_casts_outputs_changes_neither_sums_nor_gradients():
    table = random_pairs([(6, 30, 5), (2, 4, 11)])
    weights = torch.tensor([[1.0, -0.51], [0.253, 2.0]])
    found = []
    for wrap in (lambda scorer: scorer, Casting):
        scorer = make_scorer(make_model("llama"))
        sums, _ = score(wrap(scorer), table)
        assert sums.dtype == torch.float32
        (sums * weights).sum().backward()
        found.append([sums.detach(), *(p.grad for p in scorer.parameters())])
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)
