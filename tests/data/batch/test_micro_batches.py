"""Micro-batches of a step: every pair once, equal prompts together, within the budget, any
world."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.order import Budget, Order, Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.load import make_scorer
from modern_llm.setup.micro_batches import make_source
from tests.helpers.models import Table, make_model, plain_sums, random_pairs


def make(picks, budget, rank=0, world=1, shared=Sharing.LINE, batch=None):
    rows = [[[90 + p] * (p + 1), [10 + a] * (a + 1), [50 + b] * (b + 1)] for p, a, b in picks]
    examples = Examples(Table(rows), trees=shared != Sharing.ALONE)
    order = Order(len(rows), batch or len(rows), 0)
    return BatchSource(examples, order, budget, rank=rank, world=world, shared=shared)


picks = st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30)
budgets = st.builds(
    Budget, tokens=st.none() | st.integers(15, 90), examples=st.none() | st.integers(1, 9)
)


@settings(deadline=None, max_examples=100)
@given(picks, budgets, st.integers(1, 5), st.sampled_from(Sharing))
def test_every_pair_once_within_the_budget(found, budget, world, shared):
    sources = [make(found, budget, rank, world, shared) for rank in range(world)]
    batches = [list(source.micro_batches(0)) for source in sources]
    assert len({len(rank) for rank in batches}) == 1
    placed = [int(i) for rank in batches for batch in rank for i in batch.examples]
    assert sorted(placed) == list(range(len(found)))
    for batch in (batch for rank in batches for batch in rank):
        assert budget.examples is None or len(batch.examples) <= budget.examples
        if budget.tokens is not None and len(batch.examples) > 1:
            assert batch.area <= budget.tokens
    real = sum(batch.real_tokens for rank in batches for batch in rank)
    assert {source.tokens(0) for source in sources} == {real}


def test_equal_prompts_share_a_micro_batch_unless_a_rank_would_be_idle():
    found = [(p, a, b) for a, b in ((0, 1), (1, 2), (0, 2)) for p in range(4)]
    source = make(found, Budget(tokens=30))
    for batch in source.micro_batches(0):
        prompts = {found[i][0] for i in batch.examples.tolist()}
        assert all(sum(found[i][0] == p for i in batch.examples.tolist()) == 3 for p in prompts), (
            batch.examples
        )
    alone = [(2, a, b) for a in range(3) for b in range(2)]
    ranks = [list(make(alone, Budget(), rank, 3).micro_batches(0)) for rank in range(3)]
    assert all(len(batch.examples) for rank in ranks for batch in rank)


def test_evaluation_in_order_covers_every_pair():
    source = make([(0, 1, 2)] * 10, Budget(examples=2))
    seen = [i for part in source.in_order(4) for batch in part for i in batch.examples.tolist()]
    assert sorted(np.array(seen)) == list(range(10))


def test_grouping_by_prompt_puts_pairs_of_one_prompt_into_one_step_of_a_run(tmp_path):
    """From the option to the steps: another order and plan, the same pairs per epoch, fewer
    tokens."""
    import json

    from modern_llm.config import PreferenceDatasetConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo
    from tests.helpers.text import make_checkpoint, make_tokenizer, write_jsonl

    checkpoint = make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    rows = [
        {"prompt": f"Name number {p}: ", "chosen": f"one {a}", "rejected": f"two {b}"}
        for a, b in ((1, 2), (1, 3), (2, 3), (4, 1))
        for p in range(6)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    rates = {}
    for grouped in (False, True):
        folder = tmp_path / str(grouped)
        config = TrainingConfig(
            run_name="g", output_dir=folder, batch_size=8, epochs=1, log_every=1, save_every=1
        )
        run_dpo(
            checkpoint,
            config,
            DPOConfig(max_length=64, group_by_prompt=grouped),
            PreferenceDatasetConfig(dataset_name=str(data)),
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["examples"] for line in lines] == [8, 16, 24]
        rates[grouped] = [line["prefix_saving"] for line in lines]
    assert min(rates[True]) > max(rates[False]) + 0.1


WORST = {
    "a long pair among short ones": [(512, 1, 1)] + [(1, 1, 1)] * 9,
    "a long answer among short ones": [(1, 510, 1)] + [(1, 1, 1)] * 9,
    "all prompt": [(200, 1, 1), (90, 1, 1)],
    "no prompt": [(0, 150, 20), (0, 3, 60)],
}


@pytest.mark.parametrize("sizes", WORST.values(), ids=WORST)
def test_the_worst_shapes_are_those_of_plain_sequences(sizes):
    table = random_pairs(sizes)
    model = make_model("llama")
    expected = plain_sums(model, table)
    for attention, shared in (("blocks", 2), ("mask", 1), ("mask", 0), ("separate", 0)):
        scorer = make_scorer(make_model("llama"), attention)
        examples = Examples(table, trees=scorer.capabilities.trees)
        source = BatchSource(
            examples, Order(len(table), len(table), 0), Budget(tokens=520), rank=0, world=1,
            shared=Sharing(shared),
        )  # fmt: skip
        found = torch.zeros(len(table), 2, dtype=torch.float64)
        for batch in source.micro_batches(0):
            with torch.no_grad():
                output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
            found[torch.from_numpy(batch.examples)] = batch.sums(output.logprobs).double()
            if shared == Sharing.LINE:
                assert batch.area == batch.real_tokens
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_an_answer_above_the_budget_names_the_setting():
    table = random_pairs([(5, 4, 7), (9, 300, 4)])
    table.origin = lambda index: f"pairs.jsonl:{index + 1}"
    runtime = SimpleNamespace(data_rank=0, data_world=1, device=torch.device("cpu"))
    config = TrainingConfig(
        run_name="b", output_dir=Path("unused"), batch_size=2, tokens_per_micro_batch=200
    )
    scorer = make_scorer(make_model("llama"))
    with pytest.raises(UserError, match=r"pairs.jsonl:2: takes 313 tokens, above train\.tok"):
        make_source(runtime, config, table, scorer)
