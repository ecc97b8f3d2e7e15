"""Weights and margins of pairs in the loss and its statistics."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from modern_llm.cli import main
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError
from modern_llm.data.batch.order import Budget
from modern_llm.evaluation.statistics import calibration, judge
from modern_llm.objectives.catalogue import LOSSES
from modern_llm.objectives.preference import preference_loss, preference_terms
from tests.helpers.models import Table
from tests.objectives.test_preference import LENGTHS, OPTIONS, POLICY, REFERENCE, plain_loss
from tests.training.test_loss_lists import PAIRS, SPLITS, golden, scorer, step  # noqa: F401

MARGINS = [0.0, 0.3, 1.0, 2.5, 0.1]
WITH_MARGIN = [row.name for row in LOSSES.values() if row.margin]
WEIGHTS = [1, 3, 0, 2, 1, 2]
CASES = {
    "sigmoid": {},
    "a list": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "wpo": {"use_weighting": True, "loss_type": ["ipo", "sft"], "nll_coefficient": 0.1},
    "simpo": {"loss_type": "simpo"},
}


@pytest.mark.parametrize("name", WITH_MARGIN)
def test_a_margin_is_subtracted_inside_the_link(name):
    """Equal to the loss of a pair whose rejected ratio is higher by margin / beta, which is how a
    margin is defined, by plain Python; and by finite differences."""
    beta, options = 0.4, OPTIONS.get(name, {})
    policy, reference = (torch.tensor(r, dtype=torch.float64) for r in (POLICY, REFERENCE))
    lengths, margins = torch.tensor(LENGTHS), torch.tensor(MARGINS, dtype=torch.float64)
    found = preference_loss(
        policy, reference, lengths, loss_type=name, beta=beta, margins=margins, **options
    )
    expected = []
    rows = zip(POLICY, REFERENCE, LENGTHS, MARGINS, strict=True)
    for (pw, pl), r, n, margin in rows:
        raised = pl + margin / beta * (n[1] if LOSSES[name].lengths else 1)
        if name == "simpo":  # a margin of a pair beside the one of all
            o = options | {"simpo_gamma": options["simpo_gamma"] + margin}
            expected.append(plain_loss(name, beta, o, (pw, pl), r, n))
        else:
            expected.append(plain_loss(name, beta, options, (pw, raised), r, n))
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-9, atol=1e-12)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: preference_loss(
            p, reference, lengths, loss_type=name, beta=beta, margins=margins, **options
        ),
        (policy,),
    )


def test_sigmoid_with_an_offset_is_that_of_the_paper():
    policy, reference = (torch.tensor(r, dtype=torch.float64) for r in (POLICY, REFERENCE))
    r = policy - reference
    margins = torch.tensor(MARGINS, dtype=torch.float64)
    found = preference_loss(policy, reference, None, beta=0.2, margins=margins)
    expected = torch.log1p(torch.exp(-(0.2 * (r[:, 0] - r[:, 1]) - margins)))
    torch.testing.assert_close(found, expected)


def test_losses_without_a_margin_in_a_list_are_as_before():
    policy, reference = (torch.tensor(r) for r in (POLICY, REFERENCE))
    lengths, names = torch.tensor(LENGTHS), ["sigmoid", "bco_pair", "sft"]
    with_it = preference_terms(
        policy, reference, lengths, loss_type=names, margins=torch.tensor(MARGINS)
    )
    without = preference_terms(policy, reference, lengths, loss_type=names)
    assert torch.equal(with_it["bco_pair"], without["bco_pair"])
    assert torch.equal(with_it["sft"], without["sft"])
    assert not torch.allclose(with_it["sigmoid"], without["sigmoid"])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_a_pair_of_weight_n_is_n_pairs(scorer, golden, name, split):  # noqa: F811
    _, rows, reference = golden
    world, budget = SPLITS[split]
    margins = [0.0, 0.5, 1.0, 0.0, 2.0, 0.25] if name != "wpo" else None
    numbers = {"margin": margins} if margins else {}
    copies = [at for at in range(PAIRS) for _ in range(WEIGHTS[at])]
    repeated = {"margin": [margins[at] for at in copies]} if margins else {}
    weighted = step(
        scorer, Table(rows, weight=WEIGHTS, **numbers), reference, world, budget, CASES[name]
    )
    copied = step(
        scorer,
        Table([rows[at] for at in copies], **repeated),
        reference[copies],
        1,
        Budget(examples=1),
        CASES[name],
    )
    for key, value in copied[0].items():
        if key not in ("padding", "prefix_saving"):
            assert weighted[0][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    torch.testing.assert_close(weighted[1], copied[1], rtol=2e-3, atol=1e-6)


def test_a_step_of_weight_zero_alone_has_no_loss(scorer, golden):  # noqa: F811
    _, rows, reference = golden
    table = Table(rows, weight=[0] * PAIRS)
    options = {"loss_type": ["sigmoid", "sft"]}
    metrics, gradient = step(scorer, table, reference, 1, Budget(examples=2), options)
    assert metrics["loss"] == 0 and not gradient.any()


def test_evaluation_counts_a_pair_by_its_weight():
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(40, 2))
    weights = rng.integers(0, 4, 40)
    copies = np.repeat(np.arange(40), weights)
    found, expected = judge(rewards, weights.astype(float)), judge(rewards[copies])
    for name in ("accuracy", "ties", "margin", "reward_chosen", "reward_rejected"):
        assert found[name] == pytest.approx(expected[name]), name
    assert found["weight"] == weights.sum() and found["pairs"] == 40
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    margins = rewards[:, 0] - rewards[:, 1]
    found = calibration(margins, weights.astype(float))
    expected = calibration(margins[copies])
    for name in ("log_loss", "brier", "expected_error"):
        assert found[name] == pytest.approx(expected[name]), name


@pytest.mark.parametrize(
    ("options", "values", "fragment"),
    [
        ({"loss_type": "aot"}, (True, False), "a weight belongs to none of them"),
        ({"loss_type": ["aot", "sigmoid"]}, (False, True), "a margin belongs to none of them"),
        ({"loss_type": "ipo"}, (False, True), "no effect with loss_type='ipo'"),
    ],
)
def test_a_loss_that_cannot_use_them_refuses(options, values, fragment):
    with pytest.raises(ConfigError, match=fragment):
        DPOConfig(**options).refuse_values(*values)
    DPOConfig(loss_type=["ipo", "sigmoid"]).refuse_values(True, True)


def test_a_run_and_its_evaluation(tmp_path, tiny_checkpoint, tiny_pairs, capsys):
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    data = tmp_path / "pairs.jsonl"
    text = (json.dumps(row | {"weight": at % 3, "margin": 0.1}) for at, row in enumerate(rows))
    data.write_text("\n".join(text) + "\n")
    words = ["--data", str(data), "--dpo.max_length", "64", "--train.batch_size", "4"]
    words += ["--sft_checkpoint", str(tiny_checkpoint), "--train.max_steps", "2"]
    run = ["dpo", *words, "--train.run_name", "r", "--train.output_dir"]
    assert main([*run, str(tmp_path / "refused"), "--dpo.loss_type", "ipo"]) == 2
    assert "column margin" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "run")]) == 0
    assert "weight of" in (tmp_path / "run" / "summary.json").read_text()
    scores = tmp_path / "scores.jsonl"
    words = ["--model", str(tiny_checkpoint), "--data", str(data), "--max_length", "64"]
    assert main(["score", *words, "--output", str(scores)]) == 0
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    assert {line["weight"] for line in lines} == {0, 1, 2} and lines[0]["margin"] == 0.1
    capsys.readouterr()
    assert main(["evaluate", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["weight"] == sum(line["weight"] for line in lines)
    assert 0 <= result["margins_reached"] <= 1
