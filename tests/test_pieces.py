"""`examples/pieces.py`: the pieces in an Accelerate loop of one's own train as `ml.dpo` does."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import pytest

import modern_llm as ml
from tests.helpers.text import transcripts, write_jsonl

SCRIPT = Path(__file__).parents[1] / "examples" / "pieces.py"
STEPS, RATE, LENGTH = 4, 1e-3, 128


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("pieces", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", transcripts(9))


def dpo_losses(model, pairs, folder) -> list[float]:
    """Losses of `ml.dpo`, all pairs in each step, so that the order of the data does not matter."""
    ml.dpo(
        model, str(pairs), output_dir=folder, batch_size=9, max_steps=STEPS, learning_rate=RATE,
        schedule="constant", weight_decay=0.0, adam_beta2=0.999, max_grad_norm=None, log_every=1,
        max_length=LENGTH,
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def mine(script, model, pairs, folder) -> list[float]:
    return script.train(
        str(model), pairs, folder, steps=STEPS, batch_size=9, rate=RATE, max_length=LENGTH
    )


def test_it_is_short():
    assert len(SCRIPT.read_text("utf-8").splitlines()) <= 60


def test_its_losses_are_those_of_dpo_and_both_share_a_store(
    script, tiny_checkpoint, pairs, tmp_path, caplog
):
    losses = mine(script, tiny_checkpoint, pairs, tmp_path / "mine")
    assert len(losses) == STEPS and losses[-1] < losses[0]
    with caplog.at_level(logging.INFO):
        expected = dpo_losses(tiny_checkpoint, pairs, tmp_path / "run")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert any("needed 18, found 18, scored 0" in text for text in caplog.messages)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "mine" / "final")


def test_it_scores_nothing_after_a_run_that_has_scored(
    script, tiny_checkpoint, pairs, tmp_path, monkeypatch
):
    expected = dpo_losses(tiny_checkpoint, pairs, tmp_path / "run")
    monkeypatch.setattr(ml.ReferenceStore, "append", lambda *_: pytest.fail("scored again"))
    losses = mine(script, tiny_checkpoint, pairs, tmp_path / "mine")
    assert losses == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_the_page_is_dpo_where_its_margin_is_zero():
    import torch

    page = SCRIPT.parents[1] / "docs" / "howto" / "own_loss.md"
    names: dict = {}
    exec(page.read_text("utf-8").split("```python\n")[1].partition("```")[0], names)
    policy, reference = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    losses = names["margin_loss"](policy, reference, beta=0.1, margin=0.0)
    torch.testing.assert_close(losses, ml.preference_loss(policy, reference, None, beta=0.1))
    larger = names["margin_loss"](policy, reference, beta=0.1)
    assert losses.shape == (5,) and (larger > losses).all()


def test_a_collator_refuses_an_index_outside_the_table(tiny_checkpoint, pairs, tmp_path):
    from modern_llm.data.table.build import prepare_tables
    from modern_llm.models.load import inspect_checkpoint, load_model, load_tokenizer, make_scorer

    data = ml.PreferenceDatasetConfig(dataset_name=str(pairs))
    table = prepare_tables(data, load_tokenizer(tiny_checkpoint), tmp_path / "tables").train
    collator = ml.PairCollator(table, make_scorer(load_model(inspect_checkpoint(tiny_checkpoint))))
    batch = collator([3, 5])
    assert batch.examples.tolist() == [3, 5] and batch.lengths.shape == (2, 2)
    with pytest.raises(IndexError, match="row 9 of a table of 9 rows"):
        collator([9])
