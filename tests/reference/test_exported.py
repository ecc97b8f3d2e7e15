"""`reference export`: pairs with the reference's log-probs as TRL reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.evaluation.score import score_pairs
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.text import transcripts, write_jsonl

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]
LENGTH = 96


@pytest.fixture
def run(tmp_path, tiny_checkpoint, monkeypatch):
    """The arguments of a verb for a run with 12 pairs."""
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "pairs.jsonl", transcripts(12))
    settings = {
        "sft_checkpoint": str(tiny_checkpoint),
        "train": {"run_name": "r", "output_dir": str(tmp_path / "run"), "batch_size": 4},
        "dpo": {"max_length": LENGTH},
        "data": {"dataset_name": str(data)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(tmp_path / "run.yaml")]


def rows_of(path):
    import pyarrow.parquet

    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_its_columns_are_the_ids_and_the_values_of_score(
    run, tmp_path, tiny_checkpoint, capsys, suffix
):
    out = tmp_path / f"out{suffix}"
    assert main(["reference", "export", *run, "--output", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {"pairs": 12, "evaluation_pairs": 0, "output": str(out)}
    rows = rows_of(out)
    assert len(rows) == 12 and list(rows[0]) == COLUMNS
    data = PreferenceDatasetConfig(dataset_name=str(tmp_path / "pairs.jsonl"))
    score_pairs(str(tiny_checkpoint), data, tmp_path / "scores.jsonl", max_length=LENGTH)
    for row, scored in zip(rows, rows_of(tmp_path / "scores.jsonl"), strict=True):
        for side in ("chosen", "rejected"):
            assert row[f"ref_{side}_logps"] == pytest.approx(scored[f"policy_{side}"], abs=1e-4)
            assert len(row[f"{side}_ids"]) == scored[f"{side}_tokens"]
    # The store is filled: a second export scores nothing, and the file is data of a run.
    assert main(["reference", "fill", *run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scored"] == 0
    again = tmp_path / "again.jsonl"
    words = [*run, "--data.dataset_name", str(out), "--output", str(again)]
    assert main(["reference", "export", *words]) == 0
    assert [row["chosen_ids"] for row in rows_of(again)] == [row["chosen_ids"] for row in rows]


def test_held_out_pairs_have_a_file_of_their_own(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    words = [*run, "--data.eval_fraction", "0.4", "--output", str(out), "--json"]
    assert main(["reference", "export", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    held = rows_of(tmp_path / "out.evaluation.jsonl")
    assert 0 < len(held) == result["evaluation_pairs"] == 12 - len(rows_of(out))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--dpo.loss_type", "simpo"], "dpo.loss_type simpo stores no log-probs"),
        (["--dpo.reference_sync_every", "4"], "dpo.reference_sync_every moves the reference"),
        (["--dpo.reference", "model"], "dpo.reference: model stores no log-probs"),
        (["--output", "x.csv"], "name a file that ends with .parquet or .jsonl"),
        (["--output", "nowhere/x.jsonl"], "nowhere is not a folder"),
        (["--sweep", "dpo.beta=1,2"], "sweep has no effect here"),
        (["--format", "other"], "format"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_status_2(run, tmp_path, capsys, words, reason):
    given = ["--output", str(tmp_path / "x.jsonl")] if "--output" not in words else []
    assert main(["reference", "export", *run, *given, *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and reason in lines[0]


def test_an_existing_file_and_weights_are_refused(run, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    out.write_text("kept")
    assert main(["reference", "export", *run, "--output", str(out)]) == 2
    assert "exists; name another, or add --force" in capsys.readouterr().err
    rows = [row | {"weight": 2.0} for row in transcripts(12)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    assert main(["reference", "export", *run, "--output", str(out), "--force"]) == 2
    assert "pairs.jsonl:1: has the weight 2, which TRL does not read" in capsys.readouterr().err
    assert out.read_text() == "kept"


@pytest.mark.slow
def test_trl_trains_from_it_with_our_losses(run, tmp_path, tiny_checkpoint):
    trl = pytest.importorskip("trl")
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from modern_llm.data.batch.order import Order

    steps = 6
    out = tmp_path / "out.parquet"
    assert main(["reference", "export", *run, "--output", str(out)]) == 0
    rows = rows_of(out)
    order = Order(len(rows), 4, 42)
    shown = [rows[i] for step in range(steps) for i in order.step(step)]
    losses: list[float] = []

    class FromStore(trl.DPOTrainer):
        """As docs/howto/reference_elsewhere.md shows."""

        def _prepare_dataset(self, dataset, *args):
            return dataset

        def _precompute_ref_logps(self, dataset, *args):
            return dataset

        def compute_ref_log_probs(self, *args):
            raise AssertionError("the reference is not computed")

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, max_steps=steps, beta=0.1,
        per_device_train_batch_size=4, learning_rate=3e-4, lr_scheduler_type="constant",
        precompute_ref_log_probs=True, max_length=LENGTH, report_to=[], disable_dropout=True,
        train_sampling_strategy="sequential", weight_decay=0.01, adam_beta2=0.95,
        save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    FromStore(
        model=AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(shown),
        processing_class=AutoTokenizer.from_pretrained(tiny_checkpoint),
    ).train()
    fields = {"batch_size": 4, "max_steps": steps, "learning_rate": 3e-4, "log_every": 1}
    train = TrainingConfig(
        run_name="r", output_dir=tmp_path / "ours", schedule="constant", seed=42, **fields
    )
    data = PreferenceDatasetConfig(dataset_name=str(tmp_path / "pairs.jsonl"))
    run_dpo(tiny_checkpoint, train, DPOConfig(max_length=LENGTH), data)
    ours = [row["loss"] for row in rows_of(tmp_path / "ours" / "metrics.jsonl")]
    assert np.allclose(losses, ours, atol=1e-4), (losses, ours)
