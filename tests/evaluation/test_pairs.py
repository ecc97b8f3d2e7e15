"""`evaluate`: statistics of the policy's own log-probs, equal on one and on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.evaluation.pairs import evaluate_pairs
from modern_llm.evaluation.score import score_pairs
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, transcripts, write_jsonl


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_tokenizer):
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model", tiny_tokenizer, seed=7)


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder of two files, one of which has a column for groups."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", transcripts(15, seed=1))
    rows = [row | {"kind": f"k{i % 2}"} for i, row in enumerate(transcripts(10, seed=2))]
    write_jsonl(folder / "b.jsonl", rows)
    return folder


def evaluated(model, reference, data, **options) -> dict:
    config = PreferenceDatasetConfig(dataset_name=str(data))
    return evaluate_pairs(
        str(model), config, reference=str(reference), beta=0.3, max_length=96, **options
    )


def on_a_rank(*arguments) -> dict:
    import torch.distributed as dist

    found = evaluated(*arguments)
    assert dist.get_world_size() == 2
    return found


@pytest.mark.slow
def test_judgements_are_those_of_the_scores_on_one_and_two_processes(
    tmp_path, tiny_checkpoint, other, data
):
    config = PreferenceDatasetConfig(dataset_name=str(data))
    score_pairs(
        str(tiny_checkpoint), config, tmp_path / "s.jsonl", reference=str(other), max_length=96
    )
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    margins = np.array(
        [
            0.3 * (r["policy_chosen"] - r["reference_chosen"])
            - 0.3 * (r["policy_rejected"] - r["reference_rejected"])
            for r in rows
        ]
    )
    found = evaluated(tiny_checkpoint, other, data)
    assert found["pairs"] == 25
    assert found["accuracy"] == (margins > 0).mean()
    assert found["margin"] == pytest.approx(margins.mean(), abs=1e-4)
    assert found["calibration"]["log_loss"] == pytest.approx(
        np.logaddexp(0, -margins).mean(), abs=1e-4
    )
    files = found["groups"]["file"]
    assert {Path(name).name: g["pairs"] for name, g in files.items()} == {
        "a.jsonl": 15,
        "b.jsonl": 10,
    }
    assert files[str(data / "b.jsonl")]["accuracy"] == (margins[15:] > 0).mean()
    longer = np.array([r["chosen_tokens"] > r["rejected_tokens"] for r in rows])
    assert found["groups"]["length"]["chosen longer"]["accuracy"] == (margins[longer] > 0).mean()
    two = run_ranks(on_a_rank, 2, tiny_checkpoint, other, data, timeout=200)
    assert two[0] == two[1]
    assert two[0]["accuracy"] == found["accuracy"] and two[0]["pairs"] == 25
    assert two[0]["margin"] == pytest.approx(found["margin"], abs=1e-4)


def test_groups_by_a_column_without_a_reference(tiny_checkpoint, data):
    found = evaluate_pairs(
        str(tiny_checkpoint),
        PreferenceDatasetConfig(dataset_name=str(data)),
        max_length=96,
        by="kind",
    )
    assert {n: g["pairs"] for n, g in found["groups"]["kind"].items()} == {
        "(none)": 15, "k0": 5, "k1": 5
    }  # fmt: skip
    assert found["reference"] is None
    with pytest.raises(DataError, match="by 'nothing': no row of"):
        evaluated(tiny_checkpoint, tiny_checkpoint, data, by="nothing")


def test_a_model_as_its_own_reference_has_only_ties(tiny_checkpoint, data):
    found = evaluated(tiny_checkpoint, tiny_checkpoint, data)
    assert (found["accuracy"], found["ties"], found["margin"]) == (0.0, 1.0, 0.0)
    assert found["calibration"]["log_loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_verb_shows_a_table_and_gives_json(tiny_checkpoint, other, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ["--model", str(tiny_checkpoint), "--reference", str(other), "--data", str(data)]
    assert main(["evaluate", *words, "--max_length", "96"]) == 0
    out = capsys.readouterr().out
    for part in ("accuracy", "length: chosen longer", "calibration: expected error", "a.jsonl"):
        assert part in out, part
    assert main(["evaluate", *words, "--max_length", "96", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"] == 25
    assert main(["evaluate", *words, "--beta", "0"]) == 2
    assert "beta" in capsys.readouterr().err
