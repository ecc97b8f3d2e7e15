"""The order is a function of (seed, epoch, step); packing places each example exactly once."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.data.batch.order import Budget, Order, Sharing, area, pack

sizes = st.lists(
    st.tuples(st.integers(1, 60)) | st.tuples(st.integers(1, 40), st.integers(1, 40)),
    min_size=0,
    max_size=40,
)
budgets = st.builds(
    Budget, tokens=st.none() | st.integers(1, 300), examples=st.none() | st.integers(1, 9)
)


@settings(deadline=None, max_examples=300)
@given(sizes, st.integers(1, 9), budgets, st.sampled_from(Sharing))
def test_every_example_once_equal_numbers_and_within_budget(lengths, world, budget, shared):
    indices = np.arange(len(lengths)) * 3 + 1
    table = {int(i): lengths[n] for n, i in enumerate(indices)}
    ranks = pack(indices, table.__getitem__, world=world, budget=budget, shared=shared)
    assert len(ranks) == world
    assert len({len(rank) for rank in ranks}) == 1
    placed = sorted(int(i) for rank in ranks for group in rank for i in group)
    assert placed == indices.tolist()
    for rank in ranks:
        for group in rank:
            if budget.examples is not None:
                assert len(group) <= budget.examples
            if budget.tokens is not None and len(group) > 1:
                assert area([table[int(i)] for i in group], shared=shared) <= budget.tokens


@settings(deadline=None, max_examples=100)
@given(
    sizes, st.integers(1, 4), budgets, st.sampled_from(Sharing), st.randoms(use_true_random=False)
)
def test_packing_does_not_depend_on_the_order_of_its_arguments(
    lengths, world, budget, shared, random
):
    indices = np.arange(len(lengths))
    shuffled = indices.tolist()
    random.shuffle(shuffled)
    once = pack(indices, lengths.__getitem__, world=world, budget=budget, shared=shared)
    again = pack(
        np.array(shuffled, dtype=np.int64),
        lengths.__getitem__,
        world=world,
        budget=budget,
        shared=shared,
    )
    assert [[g.tolist() for g in r] for r in once] == [[g.tolist() for g in r] for r in again]


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**62), st.integers(1, 4))
def test_every_epoch_covers_each_example_once(examples, batch, seed, epochs):
    order = Order(examples, batch, seed)
    for epoch in range(epochs):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        parts = [order.step(step) for step in steps]
        assert sorted(np.concatenate(parts).tolist()) == list(range(examples))
        assert all(len(part) == batch for part in parts[:-1])
    assert order.consumed(order.steps_per_epoch * epochs) == examples * epochs


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 50), st.integers(1, 12), st.integers(0, 2**62), st.integers(0, 60))
def test_a_step_does_not_depend_on_earlier_calls(examples, batch, seed, step):
    alone = Order(examples, batch, seed).step(step)
    order = Order(examples, batch, seed)
    for other in (step + 7, 0, step + 1):
        order.step(other)
    assert np.array_equal(order.step(step), alone)
    # The permutation of an epoch is the same for every batch size.
    other = Order(examples, 1, seed)
    epoch, within = divmod(step, order.steps_per_epoch)
    singles = [int(other.step(epoch * examples + within * batch + i)[0]) for i in range(len(alone))]
    assert singles == alone.tolist()


def test_seeds_and_epochs_give_other_orders():
    order = Order(100, 100, 1)
    assert not np.array_equal(order.step(0), order.step(1))
    assert not np.array_equal(order.step(0), Order(100, 100, 2).step(0))


def test_examples_consumed_counts_the_short_step():
    order = Order(examples=7, batch_size=3, seed=0)
    assert [len(order.step(s)) for s in range(6)] == [3, 3, 1, 3, 3, 1]
    assert [order.consumed(s) for s in range(7)] == [0, 3, 6, 7, 10, 13, 14]


def test_work_is_about_even_over_ranks():
    rng = np.random.default_rng(0)
    lengths = [(int(n),) for n in rng.integers(20, 500, 64)]
    ranks = pack(
        np.arange(64), lengths.__getitem__, world=4, budget=Budget(tokens=1024), shared=Sharing.ROWS
    )
    work = [sum(lengths[int(i)][0] for group in rank for i in group) for rank in ranks]
    assert max(work) <= 1.1 * min(work)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**62),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=3),
)  # fmt: skip
def test_appended_rows_join_at_the_next_epoch_and_change_no_step_before(
    examples, batch, seed, appended
):
    order, total, at = Order(examples, batch, seed), examples, 0
    for later, more in appended:
        at, total, before = at + later, total + more, order
        order = before.joined(at, total)
        assert all(np.array_equal(order.step(s), before.step(s)) for s in range(at))
        assert order.joined(at, total) == order
    # Epoch by epoch, each is complete, and the last has every row.
    step = consumed = 0
    while True:
        epoch, within, size = order._place(step)
        assert within == 0 and step == sum(n * order._steps(m) for n, m in order._until(epoch))
        if epoch:
            assert order.steps_in(epoch) == step
        parts = [order.step(s) for s in range(step, step + order._steps(size))]
        assert sorted(np.concatenate(parts).tolist()) == list(range(size))
        for part in parts:
            assert order.consumed(step) == consumed
            step, consumed = step + 1, consumed + len(part)
        if step > at + order._steps(size):
            break
    assert size == total


def test_rows_appended_before_the_first_step_are_there_from_the_start():
    assert Order(7, 3, 1).joined(0, 9) == Order(9, 3, 1)
    # Joined twice within one epoch: rows that had not started were never read.
    once = Order(7, 3, 1).joined(1, 9)
    assert once == Order(7, 3, 1, ((1, 9),)) and once.joined(2, 12) == Order(7, 3, 1, ((1, 12),))
    assert once.steps_in(1.5) == round(3 + 0.5 * 3) and once.steps_in(3) == 9


def test_rows_are_few_equally_long_and_not_padded():
    rng = np.random.default_rng(0)
    lengths = [(int(n),) for n in rng.integers(20, 500, 200)]
    total = sum(map(sum, lengths))
    (parts,) = pack(
        np.arange(200), lengths.__getitem__, world=1, budget=Budget(tokens=2048),
        shared=Sharing.LINE,
    )  # fmt: skip
    work = [area([lengths[int(i)] for i in part], shared=Sharing.LINE) for part in parts]
    assert sum(work) == total
    assert len(parts) <= -(-total // 2048) + 1
    assert max(work) - min(work) < 64


def test_an_example_may_count_for_several():
    ranks = pack(
        np.arange(6), lambda i: (10,), world=1, budget=Budget(examples=4), shared=Sharing.LINE,
        count_of=lambda i: 3 if i == 0 else 1,
    )  # fmt: skip
    held = [sum(3 if i == 0 else 1 for i in part) for part in ranks[0]]
    assert sum(held) == 8
    assert max(held) <= 4


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 2**62)
)
def test_grouped_orders_cover_each_example_once_and_split_only_if_nothing_fits(groups, batch, seed):
    numbers = np.array(groups)
    order = Order(len(groups), batch, seed, groups=numbers)
    for epoch in range(2):
        first = epoch * order.steps_per_epoch
        steps = [order.step(first + i) for i in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(len(groups)))
        assert all(len(step) == batch for step in steps[:-1])
    # Pieces of one group beyond the minimum: at most one split per step.
    pieces = sum(len(set(numbers[step].tolist())) for step in steps)
    fewest = sum(-(-groups.count(g) // batch) for g in set(groups))
    assert pieces - fewest <= order.steps_per_epoch


def test_groups_of_equal_size_stay_whole_and_move_with_the_epoch():
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(40), 4))
    order = Order(160, 16, 5, groups=numbers)
    for step in range(20):
        found = numbers[order.step(step)]
        assert np.array_equal(np.unique(found, return_counts=True)[1], [4] * 4)
    assert not np.array_equal(order.step(0), order.step(10))
    assert not np.array_equal(order.step(0), Order(160, 16, 5).step(0))


def test_excluded_rows_are_never_read_and_the_rest_once_per_epoch():
    order = Order(21, 4, seed=3, left_out=(0, 7, 20))
    assert order.steps_per_epoch == 5 and order.kept.tolist() == [*range(1, 7), *range(8, 20)]
    for epoch in range(3):
        read = np.concatenate([order.step(5 * epoch + step) for step in range(5)])
        assert sorted(read) == order.kept.tolist()
    assert [order.consumed(step) for step in (0, 4, 5, 6)] == [0, 16, 18, 22]
    assert order.steps_in(2) == 10
    grouped = Order(21, 4, seed=3, groups=np.arange(21) // 3, left_out=(0, 7, 20))
    read = np.concatenate([grouped.step(step) for step in range(5)])
    assert sorted(read) == order.kept.tolist()


def test_excluded_rows_are_part_of_the_plan_except_appended_ones():
    plain, without = Order(21, 4, seed=3), Order(21, 4, seed=3, left_out=(7,))
    assert len({plain.digest, without.digest, Order(21, 4, seed=3, left_out=(8,)).digest}) == 3
    grown = plain.joined(7, 30)
    later = Order(21, 4, seed=3, grown=grown.grown, left_out=(25,))
    assert later.digest == plain.digest == grown.digest
    for step in range(12):  # two epochs of 21
        assert later.step(step).tolist() == plain.step(step).tolist()
    read = np.concatenate([later.step(step) for step in range(12, 20)])
    assert sorted(read) == [row for row in range(30) if row != 25]
    assert without.joined(6, 30).left_out == (7,)
