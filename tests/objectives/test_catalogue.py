"""The table of losses: complete, consistent with the functions, torch-free, with strict options."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys

import pytest

from modern_llm.objectives import losses
from modern_llm.objectives.catalogue import LOSSES, check_options, resolve_options

PROMISED = (
    "sigmoid robust hinge ipo exo_pair nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero "
    "apo_down discopop sigmoid_norm simpo orpo dpop sft plackett_luce"
).split()


def test_every_promised_loss_has_a_row_and_no_other():
    rows = [row for row in LOSSES.values() if not row.own]  # a page registers one
    assert [row.name for row in rows] == PROMISED
    assert {row.name for row in rows if row.across_pairs} == {"aot", "aot_unpaired"}
    assert {row.name for row in rows if not row.reference} == {"simpo", "orpo", "sft"}
    with_lengths = {row.name for row in rows if row.lengths}
    assert with_lengths == {"ipo", "sigmoid_norm", "simpo", "orpo", "sft"}


@pytest.mark.parametrize("name", PROMISED)
def test_row_and_function_agree(name):
    row = LOSSES[name]
    function = losses.FUNCTIONS[name]
    taken = list(inspect.signature(function).parameters)
    tensors = ["policy"] + ["reference"] * row.reference + ["lengths"] * row.lengths
    tensors += ["levels"] * row.ranking
    assert taken[: len(tensors)] == tensors
    assert set(taken[len(tensors) :]) == {"beta", *row.options}
    number = re.search(r"\d{4}\.\d{5}", row.paper).group()
    assert number in inspect.getdoc(function)


def test_every_row_has_a_function_and_every_function_a_row():
    assert set(losses.FUNCTIONS) == set(LOSSES)


def test_a_row_cannot_be_changed():
    with pytest.raises(TypeError):
        LOSSES["sigmoid"].options["label_smoothing"] = 0.3
    with pytest.raises(AttributeError):
        LOSSES["sigmoid"].reference = False
    with pytest.raises(TypeError):
        LOSSES["mine"] = LOSSES["sigmoid"]


def test_importing_and_checking_needs_no_torch():
    script = (
        "import sys\n"
        "from modern_llm.objectives.catalogue import check_options, resolve_options\n"
        "assert check_options('sigmoid', {'label_smoothing': 0.1}, beta=0.1) == []\n"
        "assert len(check_options('sigmoidd', {}, beta=-1)) == 2\n"
        "assert resolve_options('dpop', {})['dpop_lambda'] == 50\n"
        "print('torch' in sys.modules)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", PROMISED)
def test_defaults_are_accepted_by_their_own_row(name):
    options = resolve_options(name, {})
    assert options == {**LOSSES[name].options, "nll_coefficient": 0.0}
    assert check_options(name, options, beta=0.1) == []
    # A configuration with one field per option, of which the user set none.
    assert check_options(name, dict.fromkeys(options), beta=0.1) == []


@pytest.mark.parametrize(
    ("loss_type", "options", "beta", "fragments"),
    [
        ("sigmod", {}, 0.1, ["'sigmod'", "did you mean 'sigmoid'", "aot_unpaired", "dpop"]),
        ("kto", {}, 0.1, ["loss_type='kto'", "choose one of sigmoid, robust"]),
        (None, {}, 0.1, ["loss_type=None"]),
        ("sigmoid", {}, 0.0, ["beta=0.0", "(0, inf)"]),
        ("sigmoid", {}, math.nan, ["beta=nan", "(0, inf)"]),
        ("sigmoid", {}, math.inf, ["beta=inf"]),
        ("sigmoid", {}, "0.1", ["beta='0.1'", "not a number"]),
        ("sigmoid", {}, True, ["beta=True", "not a number"]),
        ("sigmoid", {"label_smoothing": 0.5}, 0.1, ["label_smoothing=0.5", "[0, 0.5)"]),
        ("robust", {"label_smoothing": 0.5}, 0.1, ["label_smoothing=0.5", "'robust'"]),
        ("robust", {"label_smoothing": -0.1}, 0.1, ["label_smoothing=-0.1"]),
        ("exo_pair", {"label_smoothing": 0.0}, 0.1, ["(0, 0.5)", "'exo_pair'"]),
        ("hinge", {"label_smoothing": 0.1}, 0.1, ["no effect", "exo_pair, aot", "'hinge'"]),
        ("sigmoid", {"discopop_tau": 0.05}, 0.1, ["no effect", "(discopop)"]),
        ("discopop", {"discopop_tau": 0.0}, 0.1, ["discopop_tau=0.0", "(0, 1]"]),
        ("discopop", {"discopop_tau": 1.5}, 0.1, ["discopop_tau=1.5", "exponentially"]),
        ("simpo", {"simpo_gamma": -1}, 0.1, ["simpo_gamma=-1"]),
        ("dpop", {"dpop_lamda": 5}, 0.1, ["dpop_lamda=5", "did you mean 'dpop_lambda'"]),
        ("dpop", {"dpop_lambda": False}, 0.1, ["dpop_lambda=False", "not a number"]),
        ("orpo", {"nll_coefficient": -1.0}, 0.1, ["nll_coefficient=-1.0", "[0, inf)"]),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_rule_value_and_fix(
    loss_type, options, beta, fragments
):
    problems = check_options(loss_type, options, beta=beta)
    assert len(problems) == 1 and "\n" not in problems[0]
    for fragment in fragments:
        assert fragment in problems[0]


def test_all_problems_are_reported_at_once():
    options = {"label_smoothing": 0.7, "simpo_gamma": 1.0, "nll_coefficient": "much"}
    assert len(check_options("sigmoid", options, beta=-1)) == 4


def test_given_values_win_over_defaults_and_none_does_not():
    options = resolve_options("simpo", {"simpo_gamma": 2, "label_smoothing": None})
    assert options == {"simpo_gamma": 2.0, "label_smoothing": 0.0, "nll_coefficient": 0.0}
