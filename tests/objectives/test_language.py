"""Language loss and perplexity against values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from modern_llm.objectives.language import language_loss, perplexity


def test_loss_is_the_negative_log_likelihood_and_its_gradient_minus_one():
    logprobs = torch.tensor([math.log(0.5), math.log(0.25), 0.0], requires_grad=True)
    losses = language_loss(logprobs)
    torch.testing.assert_close(losses, torch.tensor([math.log(2), math.log(4), 0.0]))
    losses.sum().backward()
    assert logprobs.grad.tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32(given, expected):
    assert language_loss(torch.zeros(3, dtype=given)).dtype == expected


def test_no_targets_give_no_losses():
    assert language_loss(torch.zeros(0)).shape == (0,)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(()), torch.zeros(3).long()])
def test_other_shapes_and_types_are_refused(wrong):
    with pytest.raises(ValueError, match=r"shape \(N,\)"):
        language_loss(wrong)


def test_perplexity_of_sums():
    # A uniform guess among 7 over tokens of two documents of unequal length.
    assert perplexity((3 + 11) * math.log(7), 3 + 11) == pytest.approx(7)
    assert perplexity(0.0, 5) == 1
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 2))
    with pytest.raises(ValueError, match="tokens=0"):
        perplexity(1.0, 0)
