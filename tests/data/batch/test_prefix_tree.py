"""Prefix trees: a tree by hand, and any layout of any examples against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples, lay_out
from tests.helpers.models import Table


def test_a_tree_by_hand():
    tree = lay_out(np.array([10, 11]), [np.array([20, 21, 22]), np.array([30])], [0, 1])
    assert tree.ids.tolist() == [10, 11, 20, 21, 22, 30]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 2]
    assert tree.branches.tolist() == [0, 0, 1, 1, 1, 2]
    assert tree.sources.tolist() == [1, 2, 3, 1]
    assert tree.labels.tolist() == [20, 21, 22, 30]
    assert tree.slots.tolist() == [0, 0, 0, 1]


def test_without_a_prompt_the_first_token_is_not_a_target():
    tree = lay_out(
        np.array([], dtype=np.int32), [np.array([20, 21]), np.array([30, 31, 32])], [0, 1]
    )
    assert tree.positions.tolist() == [0, 1, 0, 1, 2]
    assert tree.sources.tolist() == [0, 2, 3]
    assert tree.labels.tolist() == [21, 31, 32]
    assert tree.slots.tolist() == [0, 1, 1]


def test_documents_of_a_row_are_separate_trees():
    table = Table([[[5, 6, 7, 8, 9, 4], [0, 3, 5]]], columns=("text", "starts"))
    examples = Examples(table, trees=True)
    assert examples.sizes(0) == (3, 2, 1)
    assert examples.targets(np.array([0])).tolist() == [[3]]
    batch = collate(examples, np.array([0]), shared=Sharing.ROWS)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 4]]
    assert batch.segments[..., 0].tolist() == [[0, 0, 0], [1, 1, 2]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.targets.tolist() == [[0, 1, 3], [6, 7, 9]]
    assert batch.lengths.tolist() == [[3]]


sizes = st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 12))


@settings(deadline=None, max_examples=90)
@given(st.lists(sizes, min_size=1, max_size=9), st.booleans(), st.sampled_from(Sharing))
def test_any_layout_predicts_each_response_token_from_its_own_context(rows, trees, shared):
    """Follow every target back through the tokens that its state sees: they must be the prompt and
    the response so far."""
    counter = iter(range(1, 10_000))
    table = Table([[[next(counter) for _ in range(n)] for n in row] for row in rows])
    examples = Examples(table, trees=trees)
    batch = collate(examples, np.arange(len(rows)), shared=shared)
    ids, segments = batch.ids.numpy(), batch.segments.numpy()
    width = ids.shape[1]
    seen: dict[tuple[int, int], list[int]] = {}
    for source, label, slot in zip(*batch.targets.tolist(), batch.slots.tolist(), strict=True):
        row, at = divmod(source, width)
        tree, branch = segments[row, at]
        pair, side = divmod(slot, 2)
        context = [
            int(ids[row, j])
            for j in range(at + 1)
            if segments[row, j, 0] == tree and segments[row, j, 1] in (0, branch)
        ]
        answer = table.ids(pair, ("chosen", "rejected")[side]).tolist()
        prompt = table.ids(pair, "prompt").tolist()
        done = seen.setdefault((pair, side), [] if prompt else answer[:1])
        assert context == prompt + done
        assert label == answer[len(done)]
        done.append(label)
        assert batch.positions[row, at] == len(context) - 1
    for pair in range(len(rows)):
        for side, column in enumerate(("chosen", "rejected")):
            answer = table.ids(pair, column).tolist()
            expected = len(answer) - (0 if len(table.ids(pair, "prompt")) else 1)
            assert (
                batch.lengths[pair, side] == expected == examples.targets(np.array([pair]))[0, side]
            )
            if expected:
                assert seen[pair, side] == answer
    assert batch.real_tokens == sum(sum(examples.sizes(i)) for i in range(len(rows)))
    assert (segments[..., 0] >= 0).sum() == batch.real_tokens
    if shared == Sharing.LINE:
        assert ids.shape == (1, batch.real_tokens)
    elif not shared:
        assert len(ids) == sum(len(examples.sizes(i)) for i in range(len(rows)))


def test_no_examples_is_one_token_without_a_target():
    examples = Examples(Table([[[1], [2], [3]]]), trees=True)
    batch = collate(examples, np.array([], dtype=np.int64), shared=Sharing.ROWS)
    assert batch.ids.shape == (1, 1)
    assert batch.targets.shape == (2, 0)
    assert batch.lengths.shape == (0, 2)
    assert batch.real_tokens == 0


@pytest.mark.parametrize("trees", [True, False])
def test_sums_add_up_by_pair_and_side(trees):
    import torch

    table = Table([[[1, 2], [3, 4, 5], [6]], [[7], [8], [9, 10]]])
    batch = collate(Examples(table, trees=trees), np.array([1, 0]), shared=Sharing.ROWS)
    logprobs = batch.targets[1].double()
    assert torch.equal(
        batch.sums(logprobs), torch.tensor([[8.0, 19.0], [12.0, 6.0]], dtype=torch.float64)
    )


def test_pairs_of_one_prompt_are_one_tree_and_a_shared_answer_one_response():
    rows = [
        [[1, 2], [3, 4], [5]],
        [[7], [8], [9]],
        [[1, 2], [6], [3, 4]],
        [[1, 2], [5], [6]],
    ]
    examples = Examples(Table(rows), trees=True)
    indices = np.array([2, 1, 0, 3])
    batch = collate(examples, indices, shared=Sharing.LINE)
    assert batch.ids.tolist() == [[1, 2, 6, 3, 4, 5, 7, 8, 9]]
    assert batch.segments[0].tolist() == [
        [0, 0], [0, 0], [0, 1], [0, 2], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]
    ]  # fmt: skip
    assert batch.real_tokens == 9
    assert sum(sum(examples.group_sizes(g)) for g in examples.together(indices)) == 9
    assert batch.targets.tolist() == [[1, 1, 3, 1, 6, 6], [6, 3, 4, 5, 8, 9]]
    sums = batch.sums(batch.targets[1].double())
    assert sums.tolist() == [[6, 7], [8, 9], [7, 5], [5, 6]]
    assert batch.lengths.tolist() == [[1, 2], [1, 1], [2, 1], [1, 1]]
    assert [examples.separate_tokens(i) for i in range(4)] == [7, 4, 7, 6]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=10),
    st.sampled_from(Sharing),
)
def test_merged_trees_give_every_pair_its_own_sums_and_lengths(picks, shared):
    """Prompts and answers are drawn from a few; the sums must equal those of separate rows."""
    prompts = [[], [11], [12, 13], [14, 15, 16]]
    answers = [[21], [22, 23], [24, 25, 26], [22, 27]]
    rows = [[prompts[p], answers[a], answers[b]] for p, a, b in picks]
    merged = collate(Examples(Table(rows), trees=True), np.arange(len(rows)), shared=shared)
    apart = collate(Examples(Table(rows), trees=False), np.arange(len(rows)), shared=Sharing.ALONE)
    for batch in (merged, apart):
        # Replaces a log-prob: depends on the label and on the position of its state.
        states = batch.positions.flatten()[batch.targets[0]]
        batch_sums = batch.sums(batch.targets[1].double() + 100 * states)
        assert batch_sums.shape == (len(rows), 2)
        assert torch_equal(batch_sums, apart)
    assert merged.lengths.tolist() == apart.lengths.tolist()
    distinct = {(p, a) for p, a, b in picks} | {(p, b) for p, a, b in picks}
    assert merged.real_tokens == sum(len(prompts[p]) for p in {p for p, _, _ in picks}) + sum(
        len(answers[a]) for _, a in distinct
    )


def torch_equal(sums, apart):
    states = apart.positions.flatten()[apart.targets[0]]
    return bool((sums == apart.sums(apart.targets[1].double() + 100 * states)).all())
