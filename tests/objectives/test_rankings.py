"""Plackett-Luce: closed form, K = 2 is DPO, ties and absent responses, gradients, statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from modern_llm.objectives.preference import preference_loss, preference_statistics

BETA = 0.3
# Rankings of 4, 3 and 2 responses; the second has a tie for the second place.
LEVELS = [[0, 1, 2, 3], [0, 1, 1, -1], [0, 1, -1, -1]]


def rewards_of(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return policy and reference (3, 4), 0 where a response is absent, and the levels."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(LEVELS)
    policy, reference = (
        5 * torch.randn(3, 4, dtype=torch.float64, generator=generator) * (levels >= 0)
        for _ in range(2)
    )
    return policy, reference, levels


def ranking_loss(policy, reference, levels=None, **settings):
    return preference_loss(
        policy, reference, None, loss_type="plackett_luce", beta=BETA, levels=levels, **settings
    )


def test_closed_form_in_plain_floats():
    policy, reference, levels = rewards_of()
    expected = []
    for p, r, ranks in zip(policy.tolist(), reference.tolist(), LEVELS, strict=True):
        rewards = [BETA * (a - b) for a, b in zip(p, r, strict=True)]
        total = 0.0
        for own, rank in zip(rewards, ranks, strict=True):
            worse = [x for x, other in zip(rewards, ranks, strict=True) if other > rank >= 0]
            total += math.log(math.exp(own) + sum(map(math.exp, worse))) - own
        expected.append(total)
    found = ranking_loss(policy, reference, levels)
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-12, atol=1e-12)


def test_probabilities_of_all_orders_add_up_to_one():
    policy, reference, _ = rewards_of()
    total = 0.0
    for order in itertools.permutations(range(4)):
        order = list(order)
        total += float(torch.exp(-ranking_loss(policy[:1, order], reference[:1, order])))
    assert total == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("width", [2, 5])
def test_two_responses_are_the_sigmoid_loss(width):
    policy, reference, _ = rewards_of()
    pairs = policy[:, :2], reference[:, :2]
    expected = preference_loss(*pairs, None, loss_type="sigmoid", beta=BETA)
    assert (ranking_loss(*pairs) - expected).abs().max() < 1e-7
    padded = [torch.nn.functional.pad(side, (0, width - 2)) for side in pairs]
    levels = torch.tensor([[0, 1, *[-1] * (width - 2)]] * 3)
    assert (ranking_loss(*padded, levels) - expected).abs().max() < 1e-7


def test_finite_differences():
    policy, reference, levels = rewards_of()
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ranking_loss(p, reference, levels), policy)
    ranking_loss(policy, reference, levels).sum().backward()
    assert (policy.grad[levels < 0] == 0).all()


def test_tied_responses_do_not_compete_with_each_other():
    policy, reference, levels = rewards_of()
    own = preference_loss(policy[1:2, :2], reference[1:2, :2], None, beta=BETA)
    # The best against each of the two alone is less than against both.
    assert float(ranking_loss(policy, reference, levels)[1]) > float(own)
    swapped = policy[:, [0, 2, 1, 3]], reference[:, [0, 2, 1, 3]]
    found = ranking_loss(*swapped, levels)[1]
    assert float(found) == pytest.approx(float(ranking_loss(policy, reference, levels)[1]))


def test_statistics_are_those_of_pairs_and_kendalls_tau():
    policy, reference, levels = rewards_of(3)
    found = preference_statistics(
        policy, reference, beta=BETA, loss_type="plackett_luce", levels=levels
    )
    taus, first = [], 0
    for p, r, ranks in zip(policy.tolist(), reference.tolist(), LEVELS, strict=True):
        x = [a - b for a, b in zip(p, r, strict=True)]
        pairs = [(i, j) for i in range(4) for j in range(4) if 0 <= ranks[i] < ranks[j]]
        taus.append(sum(math.copysign(1, x[i] - x[j]) for i, j in pairs) / len(pairs))
        first += all(x[0] > x[j] for i, j in pairs if i == 0)
    assert float(found["rewards/kendall"]) == pytest.approx(sum(taus))
    assert float(found["rewards/accuracies"]) == first
    two = {"beta": BETA, "reference": reference[:, :2]}
    pair = preference_statistics(policy[:, :2], loss_type="sigmoid", **two)
    ranking = preference_statistics(policy[:, :2], loss_type="plackett_luce", **two)
    assert {name: float(ranking[name]) for name in pair} == pytest.approx(
        {name: float(value) for name, value in pair.items()}
    )
    # At the start of a run all are equal.
    start = preference_statistics(
        policy, policy, beta=BETA, loss_type="plackett_luce", levels=levels
    )
    assert float(start["ties"]) == 3 and float(start["rewards/kendall"]) == 0


def test_shapes_are_refused():
    policy, reference, levels = rewards_of()
    with pytest.raises(ValueError, match="levels must have the shape of policy"):
        ranking_loss(policy, reference, levels[:, :2])
    with pytest.raises(ValueError, match="policy must have shape"):
        preference_loss(policy, reference, None, loss_type="sigmoid")
    with pytest.raises(ValueError, match="policy must have shape"):
        ranking_loss(policy[:, :1], reference[:, :1])
