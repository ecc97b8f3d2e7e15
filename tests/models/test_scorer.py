"""Trees, packing and separate rows give the log-probs of the model's own plain forward, for every
architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models.attention.flex import SIDE
from modern_llm.models.load import make_scorer
from tests.helpers.models import (
    CONFIGS,
    WITHOUT_TREES,
    Table,
    make_model,
    plain_sums,
    random_pairs,
    score,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_trees_equal_plain_sequences(name, unequal_pairs):
    expected = plain_sums(make_model(name), unequal_pairs)
    scorer = make_scorer(make_model(name)).eval()
    assert scorer.capabilities.trees, scorer.capabilities.notes
    assert scorer.capabilities.fused, scorer.capabilities.notes
    for shared in Sharing:
        sums, _ = score(scorer, unequal_pairs, shared=shared)
        torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("merge_below", [0, 64])
def test_pairs_of_one_prompt_equal_plain_sequences(name, merge_below):
    """Eight pairs with five answers to one prompt, as in SHP; each answer is computed once."""
    one, two = random_pairs([(7, 5, 9), (4, 3, 2)]).rows, random_pairs([(1, 6, 4), (1, 1, 8)]).rows
    answers = [one[0][1], one[0][2], one[1][1], two[0][1], two[1][2]]
    pairs = [(0, 1), (0, 2), (1, 3), (4, 0), (3, 2), (2, 4), (1, 4), (3, 0)]
    rows = [[one[0][0].tolist(), answers[a].tolist(), answers[b].tolist()] for a, b in pairs]
    table = Table([*rows, [x.tolist() for x in one[1]]])
    expected = plain_sums(make_model(name), table)
    scorer = make_scorer(make_model(name)).eval()
    scorer.merge_below = merge_below
    sums, _ = score(scorer, table, shared=Sharing.LINE)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-3)
    batch = collate(Examples(table, trees=True), np.arange(len(table)), shared=Sharing.LINE)
    assert batch.real_tokens == 7 + sum(map(len, answers)) + sum(map(len, one[1]))


@pytest.mark.parametrize("name", [*CONFIGS, *WITHOUT_TREES])
def test_separate_rows_equal_plain_sequences(name, unequal_pairs):
    expected = plain_sums(make_model(name), unequal_pairs)
    scorer = make_scorer(make_model(name), "separate").eval()
    assert not scorer.capabilities.trees
    sums, _ = score(scorer, unequal_pairs)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", WITHOUT_TREES)
def test_a_model_without_trees_is_reported_and_runs_with_separate_rows(name, unequal_pairs, caplog):
    expected = plain_sums(make_model(name), unequal_pairs)
    with caplog.at_level("INFO", logger="modern_llm"):
        scorer = make_scorer(make_model(name)).eval()
    assert not scorer.capabilities.trees
    assert [r.message for r in caplog.records if "separate rows" in r.message]
    sums, _ = score(scorer, unequal_pairs)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="attention: tree"):
        make_scorer(make_model(name), "tree")


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "gpt2", "mixtral"])
def test_gradients_of_trees_equal_gradients_of_plain_sequences(name):
    table = random_pairs([(6, 3, 5), (2, 4, 1)])
    weights = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=torch.float64)

    # Grouped matrix products of experts exist only up to float32.
    dtype = torch.float32 if name == "mixtral" else torch.float64
    model = make_model(name, dtype)
    total = 0.0
    for i in range(len(table)):
        prompt = table.ids(i, "prompt").tolist()
        for side, column in enumerate(("chosen", "rejected")):
            ids = torch.tensor([prompt + table.ids(i, column).tolist()])
            logprobs = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            answer = logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :]
            total = total + weights[i, side] * answer.sum()
    total.backward()
    expected = {n: p.grad for n, p in model.named_parameters()}

    scorer = make_scorer(make_model(name, dtype))
    sums, _ = score(scorer, table)
    assert sums.dtype == dtype
    (sums * weights).sum().backward()
    for n, parameter in scorer.model.named_parameters():
        # RoPE tables and some norms are always float32 in transformers.
        torch.testing.assert_close(
            parameter.grad, expected[n], rtol=1e-4, atol=5e-5, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_no_token_sees_another_response_or_tree(name):
    """Change one answer: no bit of any other sum changes."""
    table = random_pairs([(6, 5, 4), (3, 7, 2), (5, 5, 5)])
    scorer = make_scorer(make_model(name)).eval()
    before, _ = score(scorer, table)
    table.rows[0][1] = np.roll(table.rows[0][1], 1)
    after, _ = score(scorer, table)
    assert before[0, 0] != after[0, 0]
    mask = torch.ones(3, 2, dtype=torch.bool)
    mask[0, 0] = False
    assert torch.equal(before[mask], after[mask])


def test_any_grouping_into_forwards_gives_the_same_sums(unequal_pairs):
    scorer = make_scorer(make_model("llama")).eval()
    whole, _ = score(scorer, unequal_pairs)
    parts = torch.cat([score(scorer, unequal_pairs, part)[0] for part in ([0, 1], [2], [3, 4])])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-4)


@torch.no_grad()
def test_rows_for_flex_attention_are_whole_blocks(unequal_pairs):
    """Rows of a caller have any length: a few pairs to score, one pair that is scored again."""
    expected = plain_sums(make_model("llama"), unequal_pairs)
    scorer = make_scorer(make_model("llama"), "flex").eval()
    seen = []
    scorer.model.base_model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[1])
    )
    for shared in (Sharing.ALONE, Sharing.LINE):
        sums, _ = score(scorer, unequal_pairs, shared=shared)
        torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-3)
    assert set(seen) == {SIDE}


def test_an_empty_micro_batch_touches_every_parameter_with_zero():
    scorer = make_scorer(make_model("mixtral"), router_loss=0.1)
    sums, output = score(scorer, random_pairs([(3, 2, 2)]), [])
    assert sums.shape == (0, 2)
    assert torch.isfinite(output.aux_loss)
    sums.sum().backward()
    for name, parameter in scorer.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() == 0, name


def test_wrong_shapes_are_refused():
    scorer = make_scorer(make_model("llama"))
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="segments"):
        scorer(ids, ids, ids, torch.zeros(2, 0, dtype=torch.long))
