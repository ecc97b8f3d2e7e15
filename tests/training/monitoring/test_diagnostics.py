"""Each warning is printed for its fault, once, and never for a healthy run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.training.monitoring.diagnostics import (
    Diagnostics,
    learning_rate_warning,
    spinning_threads,
)


def healthy(step: int, total: int) -> dict[str, float]:
    t = step / total
    return {
        "step": step, "loss": 0.693 * math.exp(-t), "ties": float(step == 1), "grad_norm": 2.0,
        "rewards/accuracies": 0.5 + 0.25 * t, "rewards/margins": t, "rewards/chosen": 0.2 * t,
        "logps/chosen": -100 + 2 * t, "samples/policy_tokens": 50 + 5 * t,
        "samples/reference_tokens": 50.0,
    }  # fmt: skip


def said(changes, total=100, every=2) -> list[str]:
    teacher, found = Diagnostics(total), []
    for step in [1, *range(every, total + 1, every)]:
        record = healthy(step, total)
        found += teacher.look(record | {k: v(step / total) for k, v in changes.items()})
    return found


def test_a_healthy_run_has_no_warnings():
    assert said({}) == []


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"ties": lambda t: 1.0}, "raise train.learning_rate"),
        ({"grad_norm": lambda t: 0.0}, "gradient norm is 0"),
        (
            {"logps/chosen": lambda t: -100 - 30 * t, "rewards/chosen": lambda t: -2 * t - 0.01},
            "likelihood displacement",
        ),
        ({"rewards/accuracies": lambda t: 1.0}, "accuracy is 100% this early"),
        ({"samples/policy_tokens": lambda t: 50 + 60 * t}, "sample answers are longer"),
        ({"samples/policy_tokens": lambda t: 50 - 40 * t}, "sample answers are shorter"),
    ],
)
def test_a_fault_is_named_once_with_a_setting(changes, part):
    (text,) = said(changes)
    assert part in text and text.startswith("step ")
    assert any(word in text for word in ("train.", "dpo.", "inspect"))


@pytest.mark.parametrize(
    "changes",
    [
        {"grad_norm": lambda t: 0.0},
        {"logps/chosen": lambda t: -100 - 30 * t, "rewards/chosen": lambda t: -2 * t - 0.01},
        {"samples/policy_tokens": lambda t: 50 + 60 * t},
    ],
)
def test_a_fault_of_a_kto_run_is_named_with_an_option_that_it_has(changes):
    (text,) = said(changes | {"desirable": lambda t: 0.5})
    assert "dpo." not in text


@pytest.mark.parametrize(
    "changes",
    [
        # Log-probs of other batches fall, but no chosen answer is less likely than before.
        {"logps/chosen": lambda t: -100 - 30 * t},
        # Both fall, but margins do not grow.
        {
            "logps/chosen": lambda t: -100 - 30 * t,
            "rewards/chosen": lambda t: -t - 0.01,
            "rewards/margins": lambda t: 0.01,
        },
        # Accuracy is 1 at the end: that may be learnt.
        {"rewards/accuracies": lambda t: 1.0 if t > 0.5 else 0.7},
        {"samples/policy_tokens": lambda t: 70.0},
    ],
)
def test_similar_healthy_runs_have_no_warnings(changes):
    assert said(changes) == []


def test_ties_of_the_first_step_do_not_count():
    assert said({"ties": lambda t: 1.0 if t <= 0.04 else 0.0}) == []


@pytest.mark.parametrize(
    ("rate", "full", "new", "warned"),
    [
        (5e-4, True, False, True),
        (1e-4, True, False, False),
        (5e-4, False, False, False),
        (5e-4, True, True, False),
    ],
)
def test_high_rates_are_for_adapters_and_new_models(rate, full, new, warned):
    config = TrainingConfig(run_name="a", output_dir=Path("b"), learning_rate=rate)
    assert (learning_rate_warning(config, full=full, new=new) is not None) is warned


@pytest.mark.parametrize(("parameters", "warned"), [(528_384, False), (124_000_000, True)])
def test_high_rates_are_usual_for_very_small_models(parameters, warned):
    config = TrainingConfig(run_name="a", output_dir=Path("b"), learning_rate=1e-3)
    text = learning_rate_warning(config, full=True, new=False, parameters=parameters)
    assert (text is not None) is warned


def test_a_long_run_keeps_few_records():
    teacher = Diagnostics(10**6)
    for step in range(1, 3000):
        teacher.look(healthy(step, 10**6))
    assert len(teacher._records) < 20
    assert json.dumps(teacher._records[0]) == json.dumps(healthy(1, 10**6))


def test_a_script_is_told_of_threads_that_spin():
    assert "OMP_WAIT_POLICY=passive" in spinning_threads("cpu", 2, {})
    assert spinning_threads("cpu", 1, {}) is None
    assert spinning_threads("cuda", 8, {}) is None
    assert spinning_threads("cpu", 2, {"OMP_WAIT_POLICY": "active"}) is None
    assert spinning_threads("cpu", 2, {"GOMP_SPINCOUNT": "100"}) is None
