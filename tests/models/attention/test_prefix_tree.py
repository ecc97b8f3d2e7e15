"""Every backend of the tree attention against a token-by-token implementation; no leaks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.models.attention import cpu_blocks, prefix_tree
from modern_llm.models.attention import flex as attention_flex
from modern_llm.models.attention.cpu_blocks import find_blocks
from modern_llm.models.attention.prefix_tree import TreeMasks, backends, tree_attention, visible

HEADS, WIDTH = 2, 16


def layout(rows: list[list[list[int]]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return segments and positions of rows of trees; a tree is its sizes [prefix, response,
    ...]."""
    length = max(sum(map(sum, row)) for row in rows) + padding
    segments = torch.full((len(rows), length, 2), -1)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    tree = 0
    for r, row in enumerate(rows):
        at = 0
        for sizes in row:
            for branch, size in enumerate(sizes):
                start = sizes[0] if branch else 0
                segments[r, at : at + size] = torch.tensor([tree, branch])
                positions[r, at : at + size] = torch.arange(start, start + size)
                at += size
            tree += 1
    return segments, positions


def nested(trees: list[list[tuple[int, int]]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return segments (1, L, 3) and positions of a row of trees of several levels.

    Args:
        trees: for each node how many nodes up from the one before its parent is (0: that one), and
            its number of tokens.
    """
    segments, positions = [], []
    for tree, nodes in enumerate(trees):
        path: list[tuple[int, int]] = []  # number and end position of the nodes above
        lasts = [0] * len(nodes)
        rows = []
        for number, (up, size) in enumerate(nodes):
            del path[max(1, len(path) - up) :]
            start = path[-1][1] if path else 0
            path.append((number, start + size))
            for above, _ in path:
                lasts[above] = number
            rows += [(number, start + at) for at in range(size)]
        segments += [[tree, number, lasts[number]] for number, _ in rows]
        positions += [position for _, position in rows]
    segments += [[-1, -1, -1]] * padding
    return torch.tensor([segments]), torch.tensor([positions + [0] * padding])


def inputs(segments: torch.Tensor, groups: int = 1, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    rows, length = segments.shape[:2]
    shapes = [(rows, HEADS * groups, length, WIDTH)] + [(rows, HEADS, length, WIDTH)] * 2
    return [torch.randn(shape, generator=g, dtype=dtype, requires_grad=True) for shape in shapes]


def on_path(segment: list[int], node: int) -> bool:
    """Whether a node is at or below the one of a segment."""
    _, here, *last = segment
    return here <= node <= last[0] if last else here in (0, node)


def written_out(query, key, value, segments, positions, window, scale, softcap):
    """Softmax over the visible tokens, one token at a time, as the design defines it."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out = []
    for r in range(len(segments)):
        for i in range(segments.shape[1]):
            tree, node, *_ = segments[r, i].tolist()
            seen = [
                j
                for j in range(i + 1)
                if j == i
                or (
                    tree >= 0
                    and segments[r, j, 0] == tree
                    and on_path(segments[r, j].tolist(), node)
                    and (window is None or positions[r, i] - positions[r, j] < window)
                )
            ]
            scores = (key[r, :, seen] @ query[r, :, i, :, None]).squeeze(-1) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.softmax(-1)
            out.append((weights[:, :, None] * value[r, :, seen]).sum(1))
    return torch.stack(out).view(*segments.shape[:2], *out[0].shape)


def attend(backend, tensors, segments, positions, window, softcap, merge_below):
    masks = TreeMasks(segments, positions, tensors[0].dtype, backend, merge_below)
    out, _ = tree_attention(
        torch.nn.Module(), *tensors, None, scaling=0.3, sliding_window=window, softcap=softcap,
        tree=masks,
    )  # fmt: skip
    return out


tree = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 0)
row = st.lists(tree, min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(row, min_size=1, max_size=2),
    st.integers(0, 3),
    st.sampled_from([None, 1, 3, 7]),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0, 12, 96]),
    st.sampled_from([1, 3]),
)
def test_blocks_and_masks_equal_the_token_by_token_attention(
    rows, padding, window, softcap, merge_below, groups
):
    equals_the_definition(*layout(rows, padding), window, softcap, merge_below, groups)


def equals_the_definition(segments, positions, window, softcap, merge_below, groups):
    """Compare every backend of a CPU, forward and backward."""
    real = segments[..., 0] >= 0
    tensors = inputs(segments, groups)
    expected = written_out(*tensors, segments, positions, window, 0.3, softcap)[real]
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * upstream).sum(), tensors)
    for backend in backends(torch.device("cpu")):
        out = attend(backend, tensors, segments, positions, window, softcap, merge_below)[real]
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        ours = torch.autograd.grad((out * upstream).sum(), tensors)
        for a, b in zip(ours, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


deep_tree = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), min_size=1, max_size=9)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(deep_tree, min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([None, 3, 7]),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0, 12]),
)
def test_trees_of_several_levels_equal_the_token_by_token_attention(
    trees, padding, window, softcap, merge_below
):
    equals_the_definition(*nested(trees, padding), window, softcap, merge_below, groups=2)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 200)), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 130),
    st.sampled_from([None, 100]),
)
def test_block_masks_of_several_levels_cover_exactly_what_is_visible(trees, padding, window):
    covers_exactly(*nested(trees, padding), window)


def test_two_levels_are_the_same_in_both_forms():
    segments, positions = layout([[[9, 6, 8, 3], [0, 4, 5]]], 2)
    deep, same = nested([[(0, 9), (1, 6), (1, 8), (1, 3)]], 0)
    assert torch.equal(positions[:, :26], same)
    assert torch.equal(visible(segments, positions)[:, :26, :26], visible(deep, same))


@pytest.mark.parametrize("window", [None, 20, 150])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_forward_equals_the_dense_mask(window, softcap):
    """Forward only, because the backward needs a GPU; rows of several blocks, some whole, some
    empty."""
    segments, positions = layout(
        [[[150, 140, 3], [2, 60, 20, 7]], [[0, 130], [40], [1, 1, 200]]], 9
    )
    with torch.no_grad():
        tensors = [tensor.detach() for tensor in inputs(segments, 2, torch.float32)]
        real = segments[..., 0] >= 0
        dense, flex = (
            attend(backend, tensors, segments, positions, window, softcap, 0)[real]
            for backend in ("mask", "flex")
        )
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 260), min_size=1, max_size=4), min_size=1, max_size=4).filter(
        lambda trees: 0 < sum(map(sum, trees)) < 900
    ),
    st.integers(0, 130),
    st.sampled_from([None, 5, 100, 200]),
)
def test_block_masks_cover_exactly_what_is_visible(trees, padding, window):
    covers_exactly(*layout([trees], padding), window)


def covers_exactly(segments, positions, window):
    """Compare a block mask of one row with what is visible."""
    mask = attention_flex.block_mask(segments, positions, window)
    expected = visible(segments, positions, window)[0]
    length = len(expected)
    side = attention_flex.SIDE
    index = torch.arange(length)
    by_token = mask.mask_mod(0, 0, index[:, None].expand(length, length), index.expand(length, -1))
    assert torch.equal(by_token, expected)
    some, whole = (torch.zeros(-(-length // side), -(-length // side)) for _ in range(2))
    for numbers, indices, found in (
        (mask.kv_num_blocks, mask.kv_indices, some),
        (mask.full_kv_num_blocks, mask.full_kv_indices, whole),
    ):
        for q, number in enumerate(numbers[0, 0].tolist()):
            found[q, indices[0, 0, q, :number].tolist()] = 1
    assert not (some * whole).any()
    for q in range(len(some)):
        for k in range(len(some)):
            part = expected[q * side : (q + 1) * side, k * side : (k + 1) * side]
            if whole[q, k]:
                assert part.all()
                assert part.shape == (side, side)
            elif not some[q, k]:
                assert not part.any()


def test_block_masks_skip_other_trees_and_branches():
    """In a long row few blocks are computed, which is the purpose of the block mask."""
    segments, positions = layout([[[256, 256, 256]] * 8], 0)
    mask = attention_flex.block_mask(segments, positions, None)
    computed = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    # A tree has 6 query blocks: 1 + 2, 3 + 4 for the first response, 3 + 4 for the second.
    assert computed == 8 * 17
    assert int(mask.full_kv_num_blocks.sum()) == 8 * 11


@pytest.mark.parametrize("backend", ["blocks", "mask", "flex"])
@pytest.mark.parametrize("merge_below", [0, 96])
def test_perturbing_one_token_changes_only_tokens_that_see_it(backend, merge_below):
    segments, positions = layout([[[9, 6, 8, 3], [0, 4, 5]], [[30, 1, 1], [5]]], 2)
    seen = visible(segments, positions, None)
    with torch.no_grad():
        query, key, value = (t.detach() for t in inputs(segments, 1, torch.float32))
        before = attend(backend, (query, key, value), segments, positions, None, None, merge_below)
        for r, at in ((0, 4), (0, 11), (0, 20), (0, 27), (1, 3), (1, 30), (1, 33)):
            changed = [t.clone() for t in (query, key, value)]
            for tensor in changed[1:]:
                tensor[r, :, at] += 1.0
            after = attend(backend, changed, segments, positions, None, None, merge_below)
            moved = (after != before).any(-1).any(-1)
            assert not moved[1 - r].any()
            sees = seen[r, :, at] & (segments[r, :, 0] >= 0)
            assert torch.equal(moved[r] & (segments[r, :, 0] >= 0), sees)


def test_a_long_tree_is_computed_in_short_ranges_without_a_mask_of_its_row(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    segments, positions = layout([[[300, 100, 50, 20], [150, 30, 30]]], 0)
    blocks = find_blocks(segments, positions, None, torch.float32, visible)
    parts = [(b.own, b.stop, sum(end - start for start, end in b.above)) for b in blocks]
    # Prefix and first response in six ranges that each see all before them, then other responses.
    assert parts == [
        *((0, stop, 0) for stop in (66, 133, 200, 266, 333, 400)),
        (400, 450, 300), (450, 470, 300), *((470, stop, 0) for stop in (530, 590, 650)),
        (650, 680, 150),
    ]  # fmt: skip
    assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
    assert [b.mask is None for b in blocks] == [
        b.own == b.start and b.own in (0, 470) for b in blocks
    ]
    assert max(b.mask.numel() for b in blocks if b.mask is not None) == 67 * 400
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert find_blocks(segments, positions, None, torch.float32, visible)[0].stop == 400


def test_small_trees_share_a_call():
    segments, positions = layout([[[4, 2, 2]] * 30], 0)
    blocks = find_blocks(segments, positions, None, torch.float32, visible)
    assert [b.stop - b.start for b in blocks] == [96, 96, 48]


def test_chains_of_nodes_are_computed_as_one_sequence():
    # Prefix, a start of two responses, these two, another start after the prefix with two more.
    segments, positions = nested(
        [[(0, 70), (0, 60), (0, 50), (1, 50), (2, 60), (0, 50), (1, 50)]], 0
    )
    blocks = find_blocks(segments, positions, None, torch.float32, visible, 0)
    found = {}
    for block in blocks:
        found.setdefault((block.above, block.own), []).append((block.start, block.stop))
    spans = {key: (parts[0][0], parts[-1][1]) for key, parts in found.items()}
    assert spans == {
        ((), 0): (0, 180),
        (((0, 130),), 180): (180, 230),
        (((0, 70),), 230): (230, 340),
        (((0, 70), (230, 290)), 340): (340, 390),
    }


def test_branches_out_of_order_are_refused():
    segments, positions = layout([[[3, 2, 2]]], 0)
    segments[0, 5:, 1] = 0
    with pytest.raises(ValueError, match="prefix"):
        find_blocks(segments, positions, None, torch.float32, visible, 0)


@pytest.mark.parametrize("backend", ["blocks", "mask"])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_input_dtype(backend):
    segments, positions = layout([[[9, 6, 8], [3, 4, 5]]], 1)
    query, key, value = inputs(segments, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(backend, (query, key, value.bfloat16()), segments, positions, None, None, 0)
    assert out.dtype == torch.bfloat16
    expected = attend(backend, (query, key, value), segments, positions, None, None, 0)
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.03)
    out.float().sum().backward()
    assert {t.grad.dtype for t in (query, key, value)} == {torch.float32}


@pytest.mark.parametrize("able", [True, False])
def test_keys_and_values_are_repeated_only_for_a_kernel_that_needs_it(able, monkeypatch):
    assert cpu_blocks.takes_groups(), "torch no longer reads grouped heads: memory grows"
    monkeypatch.setattr(prefix_tree, "takes_groups", lambda: able)
    segments, positions = layout([[(40, 30, 20)]], 0)
    tensors = inputs(segments, 3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.shape[1]) or tensor, lambda tensor: tensor
    ):
        attend("blocks", tensors, segments, positions, None, None, 96)
    query, key, value, out, *_ = kept
    assert (query, out) == (6, 6)
    assert (key, value) == ((2, 2) if able else (6, 6))
