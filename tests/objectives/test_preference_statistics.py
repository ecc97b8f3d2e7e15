"""`preference_statistics` against sums written out by hand; losses are in `test_preference.py`."""

from __future__ import annotations

import pytest
import torch

from modern_llm.objectives.preference import preference_statistics

# Pairs of unequal length: by sums pair 0 prefers the rejected answer, by means the chosen one.
POLICY = [[-41.3, -12.9], [-7.25, -33.1], [-19.4, -2.05], [-58.0, -61.7], [-0.61, -2.9]]
REFERENCE = [[-44.0, -11.2], [-7.9, -30.8], [-17.15, -3.6], [-58.9, -59.4], [-1.35, -2.2]]
LENGTHS = [[23, 7], [4, 19], [11, 2], [40, 37], [1, 1]]


def tensors():
    policy, reference = (torch.tensor(rows, dtype=torch.float64) for rows in (POLICY, REFERENCE))
    return policy, reference, torch.tensor(LENGTHS)


def test_statistics_are_detached_sums_over_the_pairs():
    policy = torch.tensor([[-1.0, -5.0], [-4.0, -2.0], [-3.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -3.0], [-1.0, -2.5], [-4.0, -4.0]])
    statistics = preference_statistics(policy, reference, beta=0.5)
    # Log-ratios: (1, -2), (-3, 0.5), (1, 1).
    expected = {
        "rewards/chosen": 0.5 * (1 - 3 + 1),
        "rewards/rejected": 0.5 * (-2 + 0.5 + 1),
        "rewards/accuracies": 1.0,
        "ties": 1.0,
        "rewards/margins": 0.5 * (3 - 3.5 + 0),
        "logps/chosen": -8.0,
        "logps/rejected": -10.0,
    }
    assert {key: value.item() for key, value in statistics.items()} == pytest.approx(expected)
    assert all(value.shape == () and not value.requires_grad for value in statistics.values())


def test_statistics_without_reference_are_per_token_and_may_order_pairs_otherwise():
    policy, _, lengths = tensors()
    statistics = preference_statistics(policy, None, lengths, beta=2.0, loss_type="simpo")
    means = [(p[0] / n[0], p[1] / n[1]) for p, n in zip(POLICY, LENGTHS, strict=True)]
    assert statistics["rewards/chosen"].item() == pytest.approx(2 * sum(w for w, _ in means))
    assert statistics["rewards/margins"].item() == pytest.approx(2 * sum(w - v for w, v in means))
    assert statistics["rewards/accuracies"].item() == sum(w > v for w, v in means)
    assert statistics["logps/rejected"].item() == pytest.approx(sum(p[1] for p in POLICY))


def test_statistics_add_up_over_parts_and_start_with_ties():
    policy, reference, _ = tensors()
    whole = preference_statistics(policy, reference, beta=0.1)
    first = preference_statistics(policy[:2], reference[:2], beta=0.1)
    rest = preference_statistics(policy[2:], reference[2:], beta=0.1)
    none = preference_statistics(policy[:0], reference[:0], beta=0.1)
    for key, value in whole.items():
        torch.testing.assert_close(first[key] + rest[key] + none[key], value)
    start = preference_statistics(policy, policy, beta=0.1)
    assert (start["ties"], start["rewards/accuracies"], start["rewards/margins"]) == (5, 0, 0)


def test_statistics_refuse_what_they_cannot_compute():
    policy, reference, _ = tensors()
    with pytest.raises(ValueError, match="needs the reference"):
        preference_statistics(policy, None, beta=0.1)
    with pytest.raises(ValueError, match="lengths is None"):
        preference_statistics(policy, None, beta=0.1, loss_type="orpo")
    with pytest.raises(ValueError, match="beta=-1"):
        preference_statistics(policy, reference, beta=-1)
