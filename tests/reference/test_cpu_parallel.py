"""Forwards side by side: the order, the threads they get, failures, and the very same values."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf

from modern_llm.data.batch.order import Sharing
from modern_llm.models.load import make_scorer
from modern_llm.reference import cpu_parallel
from modern_llm.reference.answers import Answers
from modern_llm.reference.cpu_parallel import in_order, lanes
from modern_llm.reference.scoring import Scoring
from tests.helpers.models import SHAPE, make_model
from tests.reference.test_scoring import config, shared_answers


@pytest.fixture
def cores():
    """Set the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_order_from_forwards_that_run_at_once(cores):
    cores(4)
    both, seen = threading.Barrier(2), []

    def work(item: int) -> int:
        both.wait(timeout=30)  # passed only if two are in it at one time
        seen.append(torch.get_num_threads())
        return item * item

    assert list(in_order(work, range(6), 2)) == [0, 1, 4, 9, 16, 25]
    assert seen == [2] * 6
    assert torch.get_num_threads() == 4


def test_a_failure_stands_in_its_place_and_nothing_far_behind_it_is_begun(cores):
    cores(2)
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise ValueError("the third")
        return item

    results = in_order(work, range(100), 2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(results)
    assert len(begun) <= 6
    assert torch.get_num_threads() == 2


def test_a_caller_that_leaves_early_gets_its_threads_back(cores):
    cores(3)
    results = in_order(lambda item: item, range(100), 3)
    assert next(results) == 0
    results.close()
    assert torch.get_num_threads() == 3
    assert not [t for t in threading.enumerate() if t.name.startswith("forward")]


def test_what_meets_others_or_keeps_something_runs_alone(cores):
    cores(3)
    cpu, plain = torch.device("cpu"), make_scorer(make_model("llama"))
    assert lanes(plain, cpu) == 3
    assert lanes(plain, torch.device("cuda")) == 1
    assert lanes(torch.nn.Sequential(plain), cpu) == 1
    assert lanes(make_scorer(make_model("mixtral")), cpu) == 1
    scaled = tf.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    assert lanes(make_scorer(tf.AutoModelForCausalLM.from_config(scaled)), cpu) == 1
    cores(1)
    assert lanes(plain, cpu) == 1


def test_values_are_bit_by_bit_those_of_one_forward_after_the_other(cores, monkeypatch):
    answers, scorer = Answers(shared_answers()), make_scorer(make_model("llama"))
    runtime = SimpleNamespace(
        device=torch.device("cpu"), accelerator=SimpleNamespace(autocast=torch.inference_mode)
    )
    found = {}
    at_once = set()
    real = Scoring._forward

    def noted(self, *args):
        at_once.add(threading.current_thread().name)
        return real(self, *args)

    monkeypatch.setattr(Scoring, "_forward", noted)
    for threads in (1, 2):
        cores(threads)
        scoring = Scoring(
            runtime, scorer, config(tokens_per_micro_batch=60), shared=Sharing.ROWS, tokens=True
        )
        trees = scoring.lay_out(answers)
        groups = trees.groups()
        assert len(groups) > 3
        parts = [part for group in scoring(trees, groups) for part in group]
        found[threads] = {
            key: (total, values.tobytes())
            for _, entries in parts
            for key, total, values in zip(
                entries.keys,
                entries.sums,
                np.split(entries.tokens, np.cumsum(entries.counts)[:-1]),
                strict=True,
            )
        }
    assert found[1] == found[2]
    assert len(found[1]) == len(answers)
    assert any(name.startswith("forward") for name in at_once)
    assert cpu_parallel.MOST >= 2
