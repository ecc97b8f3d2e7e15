"""The preference losses against plain `math` code, reference vectors, gradcheck, extreme input."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from modern_llm.objectives.catalogue import LOSSES
from modern_llm.objectives.preference import preference_loss, preference_statistics

# Pairs of very unequal lengths; pair 2 prefers the rejected answer, pair 4 has 1-token answers.
# No two ratios are equal; pairs 3 and 4 rank differently under the reference and the policy.
POLICY = [[-41.3, -12.9], [-7.25, -33.1], [-19.4, -2.05], [-58.0, -61.7], [-0.61, -2.9]]
REFERENCE = [[-44.0, -11.2], [-7.9, -30.8], [-17.15, -3.6], [-58.9, -63.4], [-0.55, -8.2]]
LENGTHS = [[23, 7], [4, 19], [11, 2], [40, 37], [1, 1]]

# Values that differ from every default, so that an ignored option is noticed.
OPTIONS = {
    "sigmoid": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.05},
    "aot": {"label_smoothing": 0.15},
    "aot_unpaired": {"label_smoothing": 0.15},
    "discopop": {"discopop_tau": 0.3},
    "simpo": {"simpo_gamma": 0.7, "label_smoothing": 0.1},
    "dpop": {"dpop_lambda": 1.5},
}
ALL = list(LOSSES)


def tensors(dtype=torch.float64):
    return (torch.tensor(POLICY, dtype=dtype), torch.tensor(REFERENCE, dtype=dtype)), torch.tensor(
        LENGTHS
    )


def loss_of(name, policy, reference, lengths, **settings):
    return preference_loss(policy, reference, lengths, loss_type=name, **settings)


# --- the same losses again, in plain Python floats ----------------------------------------------


def sigma(x):
    return 1 / (1 + math.exp(-x))


def bt(x, e=0.0):
    """Cross-entropy of a Bradley-Terry label with flip rate e."""
    return -(1 - e) * math.log(sigma(x)) - e * math.log(1 - sigma(x))


def plain_losses(name, beta, o):
    """The loss of each pair, from the papers, one pair at a time if the loss allows it."""
    if name == "aot":
        u = [w - v for w, v in POLICY]
        v = sorted(w - v for w, v in REFERENCE)
        return [bt(beta * (x - v[sorted(u).index(x)]), o["label_smoothing"]) for x in u]
    if name == "aot_unpaired":
        chosen = [p[0] - r[0] for p, r in zip(POLICY, REFERENCE, strict=True)]
        rejected = sorted(p[1] - r[1] for p, r in zip(POLICY, REFERENCE, strict=True))
        ranks = [sorted(chosen).index(x) for x in chosen]
        return [
            bt(beta * (x - rejected[k]), o["label_smoothing"])
            for x, k in zip(chosen, ranks, strict=True)
        ]
    return [
        plain_loss(name, beta, o, *pair) for pair in zip(POLICY, REFERENCE, LENGTHS, strict=True)
    ]


def plain_loss(name, beta, o, policy, reference, lengths):
    (pw, pl), (nw, nl) = policy, lengths
    w, v = pw - reference[0], pl - reference[1]
    x = beta * (w - v)
    e = o.get("label_smoothing", 0.0)
    odds_w, odds_l = (math.exp(p / n) / (1 - math.exp(p / n)) for p, n in ((pw, nw), (pl, nl)))
    q = sigma(x)
    return {
        "sigmoid": lambda: bt(x, e),
        "robust": lambda: ((1 - e) * bt(x) - e * bt(-x)) / (1 - 2 * e),
        "hinge": lambda: max(0.0, 1 - x),
        "ipo": lambda: (w / nw - v / nl - 1 / (2 * beta)) ** 2,
        "exo_pair": lambda: q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e),
        "nca_pair": lambda: bt(beta * w) + 0.5 * bt(-beta * w) + 0.5 * bt(-beta * v),
        "bco_pair": lambda: bt(beta * w) + bt(-beta * v),
        "sppo_hard": lambda: (w - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigma(beta * w) + sigma(beta * v),
        "apo_down": lambda: sigma(beta * w) + 1 - sigma(x),
        "discopop": lambda: (
            (1 - sigma(x / o["discopop_tau"])) * bt(x) + sigma(x / o["discopop_tau"]) * math.exp(-x)
        ),
        "sigmoid_norm": lambda: bt(beta * (w / nw - v / nl)),
        "simpo": lambda: bt(beta * (pw / nw - pl / nl) - o["simpo_gamma"], e),
        "orpo": lambda: -pw / nw + beta * bt(math.log(odds_w / odds_l)),
        "dpop": lambda: bt(beta * (w - v - o["dpop_lambda"] * max(0.0, -w))),
        "plackett_luce": lambda: bt(x),
        "sft": lambda: -pw / (sum(w for w, _ in LENGTHS) / len(LENGTHS)),
    }[name]()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", ALL)
def test_equals_plain_python(name, beta):
    (policy, reference), lengths = tensors()
    options = OPTIONS.get(name, {})
    losses = loss_of(name, policy, reference, lengths, beta=beta, **options)
    expected = torch.tensor(plain_losses(name, beta, options), dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_defaults_of_the_table_are_those_of_the_call(name):
    (policy, reference), lengths = tensors()
    called = loss_of(name, policy, reference, lengths)
    expected = plain_losses(name, 0.1, LOSSES[name].options)
    torch.testing.assert_close(called.tolist(), expected, rtol=1e-10, atol=1e-12)


# --- reference vectors and other implementations -------------------------------------------------


def test_equals_reference_vectors(shared):
    golden = shared / "golden" / "llama"
    expected = json.loads((golden / "expected.json").read_text())
    pairs = json.loads((golden / "pairs.json").read_text())
    policy, reference = (
        torch.tensor(
            [
                [row[f"{who}_{side}"] for side in ("chosen", "rejected")]
                for row in expected["per_pair"]
            ],
            dtype=torch.float64,
        )
        for who in ("policy", "reference")
    )
    lengths = torch.tensor([[len(p["chosen_ids"]), len(p["rejected_ids"])] for p in pairs])
    seen = set()
    for row in expected["losses"]:
        settings = {key: row[key] for key in ("beta", "label_smoothing")}
        losses = loss_of(row["loss_type"], policy, reference, lengths, **settings)
        assert losses.mean().item() == pytest.approx(row["loss"], rel=1e-4), row
        seen.add(row["loss_type"])
    assert seen == set(LOSSES) - {"simpo", "orpo", "dpop", "sft", "plackett_luce"}


def test_equals_trl_if_it_is_installed():
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is not installed")
    orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL is not installed")
    (policy, _), lengths = tensors(torch.float32)
    mean = policy / lengths
    trainer = SimpleNamespace(
        beta=2.0,
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.7,
        label_smoothing=0.1,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *rewards = cpo.CPOTrainer.cpo_loss(trainer, mean[:, 0], mean[:, 1])
    ours = loss_of("simpo", policy, None, lengths, beta=2.0, simpo_gamma=0.7, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    statistics = preference_statistics(policy, None, lengths, beta=2.0, loss_type="simpo")
    assert statistics["rewards/chosen"].item() == pytest.approx(rewards[0].sum().item())
    assert statistics["rewards/rejected"].item() == pytest.approx(rewards[1].sum().item())
    theirs = orpo.ORPOTrainer.odds_ratio_loss(trainer, mean[:, 0], mean[:, 1])[0]
    torch.testing.assert_close(
        loss_of("orpo", policy, None, lengths, beta=2.0), -mean[:, 0] - theirs
    )


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradient_is_that_of_finite_differences(name):
    # The points avoid the kinks of hinge and dpop and equal ranks in aot.
    (policy, reference), lengths = tensors()
    policy.requires_grad_()

    def function(given):
        return loss_of(name, given, reference, lengths, beta=0.3, nll_coefficient=0.2)

    assert torch.autograd.gradcheck(function, (policy,))


@pytest.mark.parametrize("name", ALL)
def test_order_of_the_pairs_does_not_matter(name):
    (policy, reference), lengths = tensors()
    order = torch.tensor([3, 0, 4, 2, 1])
    losses = loss_of(name, policy, reference, lengths)
    permuted = loss_of(name, policy[order], reference[order], lengths[order])
    torch.testing.assert_close(permuted, losses[order])


@pytest.mark.parametrize("name", ALL)
def test_only_losses_across_pairs_depend_on_the_other_pairs(name):
    (policy, reference), lengths = tensors()
    whole = loss_of(name, policy, reference, lengths)
    parts = torch.cat(
        [loss_of(name, policy[s], reference[s], lengths[s]) for s in (slice(0, 4), slice(4, 5))]
    )
    row = LOSSES[name]
    assert torch.allclose(whole, parts) is not (row.across_pairs or row.mean_lengths)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_sum_over_sorted_ratios_and_keeps_each_pairs_gradient(name):
    (policy, reference), lengths = tensors()
    policy.requires_grad_()
    loss_of(name, policy, reference, lengths).sum().backward()
    gradient, policy.grad = policy.grad, None
    r = policy - reference
    if name == "aot":
        left, right = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    else:
        left, right = r[:, 0], r[:, 1]
    gaps = left.sort().values - right.sort().values
    torch.log1p(torch.exp(-0.1 * gaps)).sum().backward()
    torch.testing.assert_close(gradient, policy.grad)


def test_robust_is_unbiased_under_flipped_labels():
    (policy, reference), lengths = tensors()
    e = 0.2
    kept = loss_of("robust", policy, reference, lengths, label_smoothing=e)
    flipped = loss_of("robust", policy.flip(1), reference.flip(1), lengths, label_smoothing=e)
    clean = loss_of("sigmoid", policy, reference, lengths)
    torch.testing.assert_close((1 - e) * kept + e * flipped, clean)


@pytest.mark.parametrize("name", ALL)
def test_nll_term_is_added_per_token_of_the_chosen_answer(name):
    (policy, reference), lengths = tensors()
    without = loss_of(name, policy, reference, lengths)
    with_it = loss_of(name, policy, reference, lengths, nll_coefficient=0.25)
    expected = [-0.25 * p[0] / n[0] for p, n in zip(POLICY, LENGTHS, strict=True)]
    torch.testing.assert_close((with_it - without).tolist(), expected)


def test_equal_models_give_ln_two():
    (policy, _), lengths = tensors()
    for name in ("sigmoid", "robust", "aot", "sigmoid_norm", "dpop"):
        losses = loss_of(name, policy, policy, lengths)
        assert losses.tolist() == pytest.approx([math.log(2)] * 5), name


@pytest.mark.parametrize("name", [name for name in ALL if LOSSES[name].reference])
def test_the_reference_gets_no_gradient(name):
    (policy, reference), lengths = tensors()
    policy.requires_grad_()
    reference.requires_grad_()
    loss_of(name, policy, reference, lengths).sum().backward()
    assert reference.grad is None and policy.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in ALL if not LOSSES[name].reference])
def test_a_loss_without_reference_does_not_read_one(name):
    (policy, reference), lengths = tensors(torch.float32)
    without = loss_of(name, policy, None, lengths)
    given = loss_of(name, policy, reference.double() * math.nan, lengths)
    assert torch.equal(without, given) and given.dtype == torch.float32


# --- types, emptiness, extremes ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_computed_in_float32_at_least(name):
    (policy, reference), lengths = tensors(torch.bfloat16)
    low = loss_of(name, policy, reference, lengths)
    same = loss_of(name, policy.float(), reference.float(), lengths)
    assert low.dtype == torch.float32 and torch.equal(low, same)
    assert loss_of(name, policy.double(), reference, lengths).dtype == torch.float64


@pytest.mark.parametrize("name", ALL)
def test_no_pairs_give_no_losses(name):
    empty = torch.zeros(0, 2, requires_grad=True)
    losses = loss_of(name, empty, torch.zeros(0, 2), torch.zeros(0, 2), nll_coefficient=0.1)
    assert losses.shape == (0,)
    losses.sum().backward()
    assert empty.grad.shape == (0, 2)


@pytest.mark.parametrize("beta", [0.1, 5.0])
@pytest.mark.parametrize("name", ALL)
def test_extreme_differences_stay_finite(name, beta):
    policy = torch.tensor(
        [[-1e4, -1e-9], [-1e-9, -1e4], [0.0, 0.0], [-1e4, -1e4]], requires_grad=True
    )
    reference = torch.tensor([[-1e-9, -1e4], [-1e4, -1e-9], [-1e4, 0.0], [0.0, 0.0]])
    lengths = torch.tensor([[1, 1], [1, 900], [3, 1], [900, 2]])
    losses = loss_of(name, policy, reference, lengths, beta=beta)
    losses.sum().backward()
    assert losses.isfinite().all() and policy.grad.isfinite().all()


def test_extreme_differences_have_their_asymptotes():
    far = torch.tensor([[-1e4, 0.0], [0.0, -1e4]], requires_grad=True)
    losses = loss_of("sigmoid", far, torch.zeros(2, 2), None, beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == [1000.0, 0.0]
    torch.testing.assert_close(far.grad, torch.tensor([[-0.1, 0.1], [0.0, 0.0]]))
    # Where discopop's exponential term vanishes, it is the logistic loss.
    assert loss_of("discopop", far, torch.zeros(2, 2), None, beta=0.1).tolist() == [1000.0, 0.0]


def test_orpo_keeps_its_digits_for_answers_that_are_nearly_certain():
    policy = torch.tensor([[-1e-4, -2.0]])
    loss = loss_of("orpo", policy, None, torch.ones(1, 2), beta=1.0).item()
    odds = 1 / math.expm1(1e-4), 1 / math.expm1(2.0)
    assert loss == pytest.approx(1e-4 + math.log1p(odds[1] / odds[0]), rel=1e-5)


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no effect with loss_type='hinge'"),
        ({"loss_type": "sigmoid_norm", "label_smoothing": 0.1}, "no effect"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "outside"),
        ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "outside"),
        ({"simpo_gamma": 1.0}, "no effect"),
        ({"gamma": 1.0}, "not an option of any loss"),
        ({"nll_coefficient": -0.1}, "nll_coefficient=-0.1"),
    ],
)
def test_wrong_options_are_refused(settings, fragment):
    (policy, reference), lengths = tensors()
    with pytest.raises(ValueError, match=fragment):
        preference_loss(policy, reference, lengths, **settings)


def test_label_smoothing_of_zero_is_not_set():
    (policy, reference), lengths = tensors()
    zero = loss_of("hinge", policy, reference, lengths, label_smoothing=0.0)
    assert torch.equal(zero, loss_of("hinge", policy, reference, lengths))


@pytest.mark.parametrize(
    ("loss_type", "change", "fragment"),
    [
        ("sigmoid", {"policy": torch.zeros(5)}, r"policy must have shape \(P, 2\).*\(5,\)"),
        ("sigmoid", {"policy": torch.zeros(2, 5)}, r"policy must have shape \(P, 2\)"),
        ("sigmoid", {"policy": torch.zeros(5, 2).long()}, "floating.*int64"),
        ("sigmoid", {"reference": torch.zeros(5, 2).long()}, "floating.*int64"),
        ("sigmoid", {"reference": torch.zeros(1, 2)}, r"reference must have the shape of policy"),
        ("sigmoid", {"reference": torch.zeros(2)}, r"reference must have the shape of policy"),
        ("sigmoid", {"reference": None}, "'sigmoid' needs the reference"),
        ("ipo", {"lengths": None}, "lengths is None"),
        ("simpo", {"lengths": None}, "lengths is None"),
        ("ipo", {"lengths": torch.ones(1, 2)}, r"lengths must have the shape of policy"),
        ("sigmoid", {"lengths": torch.ones(5)}, r"lengths must have the shape of policy"),
        ("sigmoid", {"reference": torch.zeros(5, 2, device="meta")}, "reference is on meta"),
    ],
)
def test_wrong_tensors_are_refused(loss_type, change, fragment):
    (policy, reference), lengths = tensors()
    given = {"policy": policy, "reference": reference, "lengths": lengths} | change
    with pytest.raises(ValueError, match=fragment):
        preference_loss(**given, loss_type=loss_type)


def test_the_nll_term_needs_lengths_with_any_loss():
    (policy, reference), _ = tensors()
    assert loss_of("sigmoid", policy, reference, None).shape == (5,)
    with pytest.raises(ValueError, match="lengths is None"):
        loss_of("sigmoid", policy, reference, None, nll_coefficient=1.0)
