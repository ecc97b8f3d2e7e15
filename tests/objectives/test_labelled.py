"""The losses of labelled responses against closed forms and finite differences, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from modern_llm.config.kto import KTOConfig
from modern_llm.objectives.labelled import (
    FUNCTIONS,
    kl_estimate,
    labelled_loss,
    labelled_statistics,
)
from modern_llm.objectives.labelled_catalogue import LABELLED_LOSSES

POLICY = [-41.0, -8.5, -17.0, -60.25]
REFERENCE = [-44.0, -7.9, -17.0, -58.9]
GOOD = [True, True, False, False]
KL = 0.7


def tensors(grad=False):
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=grad)
    return policy, torch.tensor(REFERENCE, dtype=torch.float64), torch.tensor(GOOD)


def s(x):
    return 1 / (1 + math.exp(-x))


def plain(loss_type, policy, reference, good, kl, beta, weights):
    """The formulas of the papers, one example at a time."""
    r = policy - reference
    if loss_type == "kto":
        value = 1 - s(beta * (r - kl)) if good else 1 - s(beta * (kl - r))
    else:
        value = 1 - s(beta * r) if good else s(beta * r)
    return value * weights[0 if good else 1]


@pytest.mark.parametrize("loss_type", LABELLED_LOSSES)
@pytest.mark.parametrize("beta, weights", [(0.1, (1.0, 1.0)), (0.5, (1.5, 0.25))])
def test_losses_are_those_of_the_papers(loss_type, beta, weights):
    policy, reference, good = tensors()
    kl = torch.tensor(KL, dtype=torch.float64)
    options = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    found = labelled_loss(policy, reference, good, kl, loss_type=loss_type, **options)
    wanted = [
        plain(loss_type, *row, KL, beta, weights)
        for row in zip(POLICY, REFERENCE, GOOD, strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("loss_type", LABELLED_LOSSES)
def test_gradients_are_finite_differences_and_none_flows_into_kl_or_reference(loss_type):
    policy, reference, good = tensors(grad=True)
    kl = torch.tensor(KL, dtype=torch.float64, requires_grad=True)
    reference.requires_grad_()
    options = {"loss_type": loss_type, "beta": 0.3, "undesirable_weight": 2.0}
    labelled_loss(policy, reference, good, kl, **options).sum().backward()
    assert kl.grad is None and reference.grad is None
    step = 1e-6
    for row in range(len(POLICY)):
        moved = torch.zeros(len(POLICY), dtype=torch.float64)
        moved[row] = step
        up, down = (
            labelled_loss(policy.detach() + sign * moved, reference, good, kl, **options).sum()
            for sign in (1, -1)
        )
        assert policy.grad[row].item() == pytest.approx((up - down).item() / (2 * step), rel=1e-6)


def test_the_kl_estimate_is_a_mean_that_is_not_negative_and_has_no_gradient():
    ratios = torch.tensor([0.5, 2.5], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(ratios.sum(), torch.tensor(2.0, dtype=torch.float64))
    assert found.item() == 1.5 and not found.requires_grad
    assert kl_estimate(-ratios.sum(), torch.tensor(2.0)).item() == 0
    assert kl_estimate(torch.tensor(0.0), torch.tensor(0.0)).item() == 0


def test_statistics_are_sums_by_label():
    policy, reference, good = tensors()
    found = labelled_statistics(policy, reference, good, beta=0.1)
    values = {name: value.item() for name, value in found.items()}
    assert values == pytest.approx(
        {
            "rewards/chosen": 0.1 * (3.0 - 0.6),
            "rewards/rejected": 0.1 * (0.0 - 1.35),
            "logps/chosen": -49.5,
            "logps/rejected": -77.25,
            "count/chosen": 2,
            "count/rejected": 2,
        }
    )


def test_no_example_gives_no_loss():
    empty = torch.zeros(0)
    found = labelled_loss(empty, empty, torch.zeros(0, dtype=torch.bool), torch.tensor(0.0))
    assert found.shape == (0,)


def test_sixteen_bit_inputs_are_computed_in_float32():
    policy, reference, good = tensors()
    found = labelled_loss(policy.bfloat16(), reference.bfloat16(), good, torch.tensor(KL))
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kl": None}, "kl is None"),
        ({"loss_type": "sigmoid"}, "not a known loss.*kto, apo_zero_unpaired"),
        ({"desirable": torch.ones(4)}, "must be bool"),
        ({"reference": torch.zeros(3)}, "shape of policy"),
        ({"policy": torch.zeros(2, 2)}, r"shape \(P,\)"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    policy, reference, good = tensors()
    given = {"policy": policy, "reference": reference, "desirable": good, "kl": torch.tensor(KL)}
    with pytest.raises(ValueError, match=message):
        labelled_loss(**(given | change))


def test_every_row_of_the_catalogue_has_its_function():
    assert set(FUNCTIONS) == set(LABELLED_LOSSES)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"desirable_weight": -1.0}, "desirable_weight"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, "both 0"),
        ({"beta": 0}, "beta"),
        ({"loss_type": "sigmoid"}, "loss_type"),
        ({"max_length": 8, "max_prompt_length": 8}, "leaves no room for a response"),
        ({"reference": "model", "flush_every": 3}, "no effect with reference: model"),
        ({"reference_digest": "0" * 16}, "reference: store alone"),
        ({"group_by_prompt": True}, "group_by_prompt"),
    ],
)
def test_bad_settings_are_refused_when_the_section_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        KTOConfig(**options)
