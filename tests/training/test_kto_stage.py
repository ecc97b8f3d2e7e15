"""The stage `kto` around its loss: labels that it refuses, verbs, store, report, evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modern_llm.config import LabelledDatasetConfig
from modern_llm.config.errors import ConfigError, DataError, StorageError
from modern_llm.setup.labelled import imbalance
from modern_llm.training.train_kto import KTOConfig, run_kto
from tests.helpers.kto import (
    BATCH,
    LENGTH,
    ROWS,
    SEED,
    labelled,
    make_inputs,
    our_run,
    records,
    settings,
)
from tests.helpers.text import write_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("kto"))


def test_a_store_that_lacks_a_mismatched_response_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    our_run(*inputs, tmp_path / "apo", {"loss_type": "apo_zero_unpaired"}, max_steps=1)
    with pytest.raises(StorageError, match=r"kto.reference: store: .* lacks \d+ of \d+ answers"):
        our_run(*inputs, tmp_path / "kto", {"reference": "store"})


def test_evaluation_uses_every_row_once(inputs, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", labelled(13, seed=3))
    checkpoint, data = inputs
    run_kto(
        checkpoint,
        settings(tmp_path / "run", max_steps=2, eval_every=1),
        KTOConfig(max_length=LENGTH),
        LabelledDatasetConfig(dataset_name=str(data), eval_dataset_name=str(held_out)),
    )
    first, last = records(tmp_path / "run")
    labels = [row["label"] for row in labelled(13, seed=3)]
    assert last["eval/desirable"] == pytest.approx(sum(labels) / 13)
    names = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
    assert all(f"eval/{name}" in last for name in names)
    assert first["eval/loss"] != last["eval/loss"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row | {"label": True} for row in labelled(12)], "all 12 training rows are labelled desi"),
        ([row | {"prompt": "Why?"} for row in labelled(12)], "the same prompt"),
        (labelled(1), "1 training rows are labelled|1 examples are left"),
    ],
)
def test_data_that_kto_cannot_use_is_refused_before_a_model_is_loaded(
    inputs, tmp_path, rows, message, monkeypatch
):
    from modern_llm.setup import scorers

    monkeypatch.setattr(scorers, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        our_run(inputs[0], data, tmp_path / "run")


@pytest.mark.parametrize(
    "label, metric, missing",
    [(True, "eval/rewards/margins", "undesirable"), (False, "eval/logps/chosen", "desirable")],
)
def test_a_best_metric_that_the_evaluation_cannot_have_is_refused(
    inputs, tmp_path, label, metric, missing
):
    rows = [row | {"label": label} for row in labelled(9, seed=3)]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    options = {"keep_best": True, "best_metric": metric, "eval_every": 1}
    with pytest.raises(ConfigError, match=f"{metric}: no evaluation row is labelled {missing}"):
        run_kto(
            inputs[0],
            settings(tmp_path / "run", **options),
            KTOConfig(max_length=LENGTH),
            LabelledDatasetConfig(dataset_name=str(inputs[1]), eval_dataset_name=str(held_out)),
        )


def test_weights_that_do_not_balance_the_labels_are_advised():
    class Table:
        train = type("T", (), {"values": lambda self, name: np.array([1.0] * 30 + [0.0] * 10)})()

    advice = imbalance(KTOConfig(), Table())
    assert advice is not None and "kto.undesirable_weight of 2.25 to 3" in advice
    assert imbalance(KTOConfig(undesirable_weight=2.5), Table()) is None
    low = imbalance(KTOConfig(undesirable_weight=6), Table())
    assert low is not None and "kto.desirable_weight of 2 to 2.67" in low


def test_the_verb_takes_a_file_and_a_dry_run_keeps_nothing(inputs, tmp_path, capsys, monkeypatch):
    from modern_llm.cli import main

    checkpoint, data = inputs
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    train = {"run_name": "k", "output_dir": "run", "batch_size": 4, "max_steps": 2}
    sections = {"train": train, "data": {"dataset_name": str(data)}, "kto": {"max_length": LENGTH}}
    file.write_text(json.dumps({"sft_checkpoint": str(checkpoint), **sections}))
    assert main(["kto", str(file), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["forward_backward"]["metrics"]["loss"] == pytest.approx(0.5)
    assert result["data"]["examples"] == ROWS and not (tmp_path / "run").exists()
    assert main(["inspect", "--config", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["kind"], result["max_length"], result["batch_size"]) == ("labelled", LENGTH, 4)
    assert result["sources"][0]["values"]["label"]["rows"] == ROWS
    assert main(["plan", "--config", str(file), "--json"]) == 0
    capsys.readouterr()
    assert main(["kto", str(file), "--kto.undesirable_weight", "-1"]) == 2
    assert "kto.undesirable_weight" in capsys.readouterr().err


def test_a_finished_run_has_a_card_and_a_page_with_its_kl(inputs, tmp_path):
    from modern_llm.report.card import model_card

    our_run(*inputs, tmp_path / "run", max_steps=2)
    card = model_card(tmp_path / "run")
    assert "- kto" in card and "Trained by modern-llm: kto" in card and "KL divergence" in card
    assert "KL divergence from the reference" in (tmp_path / "run" / "report.html").read_text()


def test_the_function_of_one_call_reads_rows_from_memory(inputs, tmp_path):
    import modern_llm as ml

    rows = labelled(12)
    options = {"max_steps": 1, "batch_size": 4, "max_length": LENGTH, "undesirable_weight": 2.0}
    final = ml.kto(str(inputs[0]), rows, output_dir=tmp_path / "run", **options)
    assert final.name == "kto_final"
    assert records(tmp_path / "run")[0]["examples"] == 4


@pytest.mark.slow
def test_reference_fill_scores_what_a_run_with_the_store_needs(
    inputs, tmp_path, capsys, monkeypatch
):
    from modern_llm.cli import main

    checkpoint, data = inputs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    train = {"run_name": "k", "output_dir": "run", "batch_size": BATCH, "seed": SEED}
    sections = {"train": train, "data": {"dataset_name": str(data)}, "kto": {"max_length": LENGTH}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"sft_checkpoint": str(checkpoint), **sections}))
    found = {"needed": 0}
    for part in ("1/2", "2/2"):
        assert main(["reference", "fill", str(file), "--part", part, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found["needed"] += result["needed"]
    assert ROWS < found["needed"] <= 2 * ROWS
    our_run(checkpoint, data, tmp_path / "run", {"reference": "store"}, max_steps=2)
    words = ["--sft_checkpoint", str(checkpoint), "--kto.reference", "model"]
    assert main(["reference", "fill", str(file), *words]) == 2
    assert "kto.reference: model: a store is filled" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_whose_value_is_not_finite_is_left_out_and_listed(inputs, tmp_path, monkeypatch):
    from modern_llm.reference.reference_pass import ReferencePass

    real = ReferencePass.compute

    def spoiled(self, policy):
        values = real(self, policy)
        values["training responses"][3, 1] = np.nan
        return values

    monkeypatch.setattr(ReferencePass, "compute", spoiled)
    found = our_run(*inputs, tmp_path / "run", max_steps=4)
    assert found[-1]["examples"] == ROWS - 1
    (line,) = (tmp_path / "run" / "data" / "dropped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["origin"].endswith(":4")


def test_an_order_by_length_pairs_rows_within_its_own_steps(inputs, tmp_path):
    from transformers import AutoTokenizer

    from modern_llm.setup.labelled import read_labelled, with_others
    from modern_llm.setup.micro_batches import order_of

    checkpoint, data = inputs
    section = LabelledDatasetConfig(dataset_name=str(data), order="length")
    kto, train = KTOConfig(max_length=LENGTH), settings(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prepared = with_others(train, kto, read_labelled(section, tokenizer, kto, tmp_path / "t"))
    order = order_of(train, ROWS, by="length", keys=prepared.order_keys())
    for number in range(ROWS // BATCH):
        step = set(order.step(number).tolist())
        assert {int(prepared.train.others[row]) for row in step} <= step
