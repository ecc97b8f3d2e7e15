"""Lists of losses, f-divergences and WPO's weights against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from modern_llm.config.dpo import DPOConfig
from modern_llm.objectives.catalogue import DIVERGENCES, LOSSES
from modern_llm.objectives.preference import (
    preference_loss,
    preference_statistics,
    preference_terms,
)
from modern_llm.objectives.weighting import agreement_weights, divergence_scores
from tests.objectives.test_preference import LENGTHS, POLICY, REFERENCE, bt, tensors

MPO = ["sigmoid", "bco_pair", "sft"]
DIVERGENT = [row.name for row in LOSSES.values() if row.divergence]


def scores(kind, alpha):
    """f'(t) of one log-ratio, from the table of f-DPO."""
    return {
        "reverse_kl": lambda r: r,
        "forward_kl": lambda r: 1 - 1 / math.exp(r),
        "js_divergence": lambda r: math.log(2 * math.exp(r) / (1 + math.exp(r))),
        "alpha_divergence": lambda r: (math.exp(r) ** (alpha - 1) - 1) / (alpha - 1),
    }[kind]


def test_a_list_is_the_weighted_sum_of_its_losses():
    (policy, reference), lengths = tensors()
    one_by_one = {name: preference_loss(policy, reference, lengths, loss_type=name) for name in MPO}
    terms = preference_terms(policy, reference, lengths, loss_type=MPO)
    assert list(terms) == MPO
    for name, expected in one_by_one.items():
        torch.testing.assert_close(terms[name], expected)
    total = preference_loss(policy, reference, lengths, loss_type=MPO, loss_weights=[0.8, 0.2, 1])
    expected = 0.8 * terms["sigmoid"] + 0.2 * terms["bco_pair"] + terms["sft"]
    torch.testing.assert_close(total, expected)
    plain = preference_loss(policy, reference, lengths, loss_type=MPO)
    torch.testing.assert_close(plain, sum(one_by_one.values()))


def test_the_nll_term_is_a_term_of_its_own_beside_a_list():
    (policy, reference), lengths = tensors()
    found = preference_loss(policy, reference, lengths, loss_type=MPO, nll_coefficient=0.5)
    without = preference_loss(policy, reference, lengths, loss_type=MPO)
    torch.testing.assert_close(found - without, -0.5 * policy[:, 0] / lengths[:, 0])


def test_sft_averages_over_the_chosen_tokens_of_the_step():
    (policy, reference), lengths = tensors()
    losses = preference_loss(policy, None, lengths, loss_type="sft")
    tokens = sum(w for w, _ in LENGTHS)
    assert losses.mean().item() == pytest.approx(-sum(w for w, _ in POLICY) / tokens)
    # In parts, each told the mean of the whole step.
    mean = tokens / len(LENGTHS)
    parts = [
        preference_loss(policy[s], None, lengths[s], loss_type="sft", mean_length=mean)
        for s in (slice(0, 1), slice(1, 5))
    ]
    torch.testing.assert_close(torch.cat(parts), losses)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_equal_the_table_of_the_paper(kind, alpha):
    (policy, reference), _ = tensors()
    r = (policy - reference).requires_grad_()
    found = divergence_scores(r, kind, alpha)
    f = scores(kind, alpha)
    torch.testing.assert_close(found.tolist(), [[f(x) for x in row] for row in r.tolist()])
    assert torch.autograd.gradcheck(lambda given: divergence_scores(given, kind, alpha), (r,))


def test_alpha_between_the_two_kl_divergences():
    r = torch.linspace(-3, 3, 10, dtype=torch.float64).view(5, 2)
    for alpha, kind in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        torch.testing.assert_close(
            divergence_scores(r, "alpha_divergence", alpha), divergence_scores(r, kind)
        )
    torch.testing.assert_close(
        divergence_scores(r, "alpha_divergence"), divergence_scores(r, "alpha_divergence", 0.5)
    )


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("name", DIVERGENT)
def test_a_loss_reads_the_scores_in_place_of_the_log_ratios(name, kind):
    (policy, reference), lengths = tensors()
    f = scores(kind, 0.5)
    changed = torch.tensor(
        [
            [f(p - q) for p, q in zip(*rows, strict=True)]
            for rows in zip(POLICY, REFERENCE, strict=True)
        ],
        dtype=torch.float64,
    )
    expected = preference_loss(changed, torch.zeros_like(changed), lengths, loss_type=name)
    found = preference_loss(policy, reference, lengths, loss_type=name, f_divergence=kind)
    torch.testing.assert_close(found, expected)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: preference_loss(
            p, reference, lengths, loss_type=[name, "sft"], f_divergence=kind, mean_length=7.0
        ),
        (policy,),
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_extreme_ratios_stay_finite(kind):
    policy = torch.tensor([[-1e4, -1e-9], [-1e-9, -1e4], [0.0, 0.0]], requires_grad=True)
    reference = torch.tensor([[-1e-9, -1e4], [-1e4, -1e-9], [-1e4, 0.0]])
    losses = preference_loss(policy, reference, None, f_divergence=kind, beta=5.0)
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.isfinite().all()


def test_rewards_are_log_ratios_with_any_divergence_and_list():
    (policy, reference), lengths = tensors()
    one = preference_statistics(policy, reference, lengths, beta=0.1)
    many = preference_statistics(policy, reference, lengths, beta=0.1, loss_type=["sft", "sigmoid"])
    assert one == many
    alone = preference_statistics(policy, None, lengths, beta=1.0, loss_type=["simpo", "sft"])
    means = [w / n for (w, _), (n, _) in zip(POLICY, LENGTHS, strict=True)]
    assert alone["rewards/chosen"].item() == pytest.approx(sum(means))


def test_weights_of_wpo_are_the_products_of_mean_agreements():
    agreement = torch.tensor([[-2.0, -9.0], [0.5, -4.0]], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[4, 3], [1, 8]])
    weights = agreement_weights(agreement, lengths)
    assert weights.tolist() == pytest.approx([math.exp(-0.5 - 3), math.exp(0.5 - 0.5)])
    assert not weights.requires_grad
    assert agreement_weights(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [1.0]


def test_smoothing_goes_to_the_losses_that_take_it():
    (policy, reference), lengths = tensors()
    found = preference_terms(
        policy, reference, lengths, loss_type=["robust", "bco_pair"], label_smoothing=0.2
    )
    e, deltas = (
        0.2,
        [0.1 * (p[0] - r[0] - p[1] + r[1]) for p, r in zip(POLICY, REFERENCE, strict=True)],
    )
    expected = [((1 - e) * bt(x) - e * bt(-x)) / (1 - 2 * e) for x in deltas]
    torch.testing.assert_close(found["robust"].tolist(), expected)


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"loss_type": []}, "loss_type is empty"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "names 'sigmoid' twice"),
        ({"loss_type": ["sigmoid", "sfd"]}, "did you mean 'sft'"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 numbers for 2 losses"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0]}, "loss_weights=0"),
        ({"loss_weights": [2.0]}, "no effect with one loss"),
        ({"loss_type": ["hinge", "sft"], "label_smoothing": 0.1}, "'hinge' \\+ 'sft'"),
        ({"f_divergence": "kl"}, "f_divergence"),
        ({"f_alpha": 0.3}, "no effect with f_divergence='reverse_kl'"),
        ({"f_divergence": "alpha_divergence", "f_alpha": 1.5}, "f_alpha=1.5"),
        ({"f_divergence": "forward_kl", "loss_type": "bco_pair"}, "not defined for"),
        ({"f_divergence": "forward_kl", "loss_type": "simpo"}, "not defined for"),
        ({"f_divergence": "forward_kl", "loss_type": "sft"}, "no effect with loss_type='sft'"),
        ({"use_weighting": True, "loss_type": ["aot", "sft"]}, "sorts the pairs"),
        ({"ld_alpha": 0.5, "loss_type": ["sigmoid", "sft"]}, "ld_alpha cannot be combined"),
        ({"loss_type": ["simpo", "sft"], "reference": "store"}, "'simpo \\+ sft'"),
    ],
)
def test_a_combination_that_cannot_be_is_refused(settings, fragment):
    with pytest.raises(ValueError, match=fragment):
        DPOConfig(**settings)


def test_a_configuration_of_several_losses():
    config = DPOConfig(loss_type=MPO, loss_weights=[0.8, 0.2, 1.0], nll_coefficient=0.1)
    assert config.coefficients == {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0, "nll": 0.1}
    assert config.needs_reference and config.needs_mean_length and not config.looks_across_pairs
    assert DPOConfig(loss_type=["aot", "sft"]).looks_across_pairs
