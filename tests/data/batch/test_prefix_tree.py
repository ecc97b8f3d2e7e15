"""Prefix trees: a tree by hand, and any layout of any examples against the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples, lay_out
from modern_llm.data.batch.shared_starts import SHARED, shared_starts
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
        assert batch_sums(batch).shape == (len(rows), 2)
        assert torch_equal(batch_sums(batch), apart)
    assert merged.lengths.tolist() == apart.lengths.tolist()
    distinct = {(p, a) for p, a, b in picks} | {(p, b) for p, a, b in picks}
    assert merged.real_tokens == sum(len(prompts[p]) for p in {p for p, _, _ in picks}) + sum(
        len(answers[a]) for _, a in distinct
    )


LONG = list(range(100, 100 + SHARED))
"""A start long enough to be shared."""


def test_responses_that_begin_alike_share_their_start():
    tree = lay_out(
        np.array([1, 2]), [np.array([*LONG, 3, 4]), np.array([9]), np.array([*LONG, 5])], [0, 1, 2]
    )
    n = len(LONG)
    assert tree.ids.tolist() == [1, 2, *LONG, 3, 4, 5, 9]
    assert tree.positions.tolist() == [0, 1, *range(2, 2 + n), 2 + n, 3 + n, 2 + n, 2]
    assert tree.branches.tolist() == [0, 0, *[1] * n, 2, 2, 3, 4]
    assert tree.lasts.tolist() == [4, 4, *[3] * n, 2, 2, 3, 4]
    assert tree.labels.tolist() == [*LONG, 3, 4, 5, 9]
    assert tree.sources.tolist() == [*range(1, 1 + n), 1 + n, 2 + n, 1 + n, 1]
    assert tree.answers == [(0, 2), (0,), (2,), (1,)]
    short = lay_out(np.array([1]), [np.array([*LONG[1:], 3]), np.array([*LONG[1:], 4])], [0, 1])
    assert short.lasts is None, "a shorter start is not worth a node"


def test_an_answer_that_begins_another_ends_inside_the_tree():
    table = Table([[[1], LONG, [*LONG, 3]], [[7], [8], [9]]])
    batch = collate(Examples(table, trees=True), np.array([0, 1]), shared=Sharing.LINE)
    n = len(LONG)
    assert batch.ids.tolist() == [[1, *LONG, 3, 7, 8, 9]]
    assert batch.segments[0, -4:].tolist() == [[0, 2, 2], [1, 0, 2], [1, 1, 1], [1, 2, 2]]
    assert batch.sums(batch.targets[1].double()).tolist() == [
        [sum(LONG), sum(LONG) + 3], [8, 9]
    ]  # fmt: skip
    assert batch.lengths.tolist() == [[n, n + 1], [1, 1]]


def test_starts_are_shared_only_as_far_as_both_train_on_the_same_tokens():
    ids = np.array([*LONG, *LONG])
    gaps = [np.array([[SHARED + 2, SHARED + 4]]), np.array([[SHARED + 2, SHARED + 9]])]
    nodes = shared_starts([ids, ids], gaps)
    assert [(node.of, node.start, node.size) for node in nodes] == [
        ((0, 1), 0, SHARED + 4), ((0,), SHARED + 4, SHARED - 4), ((1,), SHARED + 4, SHARED - 4)
    ]  # fmt: skip


parts = st.lists(st.integers(0, 4), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), parts, parts).filter(lambda pick: pick[1] != pick[2]),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(Sharing),
)
def test_trees_of_several_levels_give_every_pair_its_own_sums(picks, shared):
    """Answers are made of a few pieces, some long; the sums must equal those of separate rows."""
    prompts = [[], [11], [12, 13]]
    pieces = [[21], [22, 23], *(list(range(at, at + SHARED + at % 3)) for at in (30, 70, 111))]
    answers = [[[t for at in side for t in pieces[at]] for side in (a, b)] for _, a, b in picks]
    rows = [[prompts[p], *both] for (p, _, _), both in zip(picks, answers, strict=True)]
    examples = Examples(Table(rows), trees=True)
    every = np.arange(len(rows))
    merged = collate(examples, every, shared=shared)
    apart = collate(Examples(Table(rows), trees=False), every, shared=Sharing.ALONE)
    for batch in (merged, apart):
        assert torch_equal(batch_sums(batch), apart)
    assert merged.lengths.tolist() == apart.lengths.tolist()
    sizes = [examples.group_sizes(group) for group in examples.together(every)]
    assert merged.real_tokens == sum(map(sum, sizes))
    assert merged.real_tokens <= sum(examples.separate_tokens(int(i)) for i in every)
    one = [collate(examples, np.array([i]), shared=shared).real_tokens for i in every]
    assert one == [sum(examples.sizes(int(i))) for i in every]


def batch_sums(batch):
    """Sum numbers that depend on a target's id and on the position of its state."""
    states = batch.positions.flatten()[batch.targets[0]]
    return batch.sums(batch.targets[1].double() + 100 * states)


def torch_equal(sums, apart):
    return bool((sums == batch_sums(apart)).all())
