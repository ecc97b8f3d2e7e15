"""Pairs with a log-prob that is not finite are left out, listed and counted; the others train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.data import MixtureSource
from modern_llm.config.errors import DataError
from modern_llm.evaluation.pairs import evaluate_pairs
from modern_llm.evaluation.score import score_pairs
from modern_llm.reference.commands import fill_reference
from modern_llm.reference.scoring import Scoring
from modern_llm.training.tasks.preference import PreferenceTask
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import transcripts, write_jsonl

ROWS, BAD = 45, (12, 30)
REASON = "a log-prob that is not finite under the reference"


@pytest.fixture(scope="module")
def bad(tmp_path_factory, tiny_checkpoint) -> Path:
    """A model for which every answer with `~` has no finite log-prob."""
    place = tmp_path_factory.mktemp("bad") / "model"
    shutil.copytree(tiny_checkpoint, place)
    tensors = load_file(place / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(tiny_checkpoint)("~")["input_ids"]
    embedding = tensors["model.embed_tokens.weight"].clone()
    embedding[token] = float("inf")
    changed = tensors | {"model.embed_tokens.weight": embedding}
    save_file(changed, place / "model.safetensors", metadata={"format": "pt"})
    return place


def pairs(folder: Path, rows: tuple[int, ...] = BAD) -> Path:
    lines = transcripts(ROWS)
    for row in rows:
        lines[row]["rejected"] += "~"
    return write_jsonl(folder / "pairs.jsonl", lines)


def arguments(folder: Path, policy: Path, reference: Path, data: Path, dpo=None, **train) -> dict:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 4, "max_steps": 14, "log_every": 1,
        "learning_rate": 1e-3, "eval_every": 7, "save_every": 3,
    }  # fmt: skip
    options = {"max_length": 96, "reference_checkpoint": str(reference)} | (dpo or {})
    return {
        "sft_checkpoint": policy,
        "train_config": TrainingConfig(**(fields | train)),
        "dpo_config": DPOConfig(**options),
        "preference_config": PreferenceDatasetConfig(dataset_name=str(data), eval_fraction=0.2),
    }


def run(*args, **kwargs) -> list[tuple]:
    final = run_dpo(**arguments(*args, **kwargs))
    lines = (final.parent / "metrics.jsonl").read_text().splitlines()
    names = ("step", "examples", "loss", "grad_norm", "rewards/margins", "eval/loss")
    return [tuple(json.loads(line).get(name, 0.0) for name in names) for line in lines]


def on_a_rank(folder: Path, policy: Path, reference: Path, data: Path) -> dict:
    """The run and the origins that this rank has trained on and evaluated."""
    import torch.distributed as dist

    seen, read = [], PreferenceTask.micro_batches

    def noted(self, step):
        seen.extend(origin for part in self.origins(step) for origin in part)
        return read(self, step)

    PreferenceTask.micro_batches = noted
    try:
        records = run(folder, policy, reference, data)
    finally:
        PreferenceTask.micro_batches = read
    return {"records": records, "seen": seen, "world": dist.get_world_size()}


def listed(folder: Path) -> list[dict]:
    text = (folder / "dropped_rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_a_run_reads_none_of_them_on_one_process_or_two_and_goes_on_the_same(
    tmp_path, tiny_checkpoint, bad
):
    data = pairs(tmp_path)
    whole = run(tmp_path / "whole", tiny_checkpoint, bad, data)
    origins = {f"{data}:{row + 1}" for row in BAD}
    assert {line["origin"] for line in listed(tmp_path / "whole" / "data")} == origins
    assert [line["reason"] for line in listed(tmp_path / "whole" / "data")] == [REASON] * 2
    assert all(np.isfinite(value) for record in whole for value in record)

    with broken_at(10), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", tiny_checkpoint, bad, data)
    assert run(tmp_path / "broken", tiny_checkpoint, bad, data) == whole
    assert len(listed(tmp_path / "broken" / "data")) == 2, "listed once, not once a start"

    both = run_ranks(on_a_rank, 2, tmp_path / "two", tiny_checkpoint, bad, data)
    for rank in both:
        assert rank["world"] == 2 and len(rank["records"]) == len(whole)
        for one, other in zip(rank["records"], whole, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    seen = [origin for rank in both for origin in rank["seen"]]
    assert not origins & set(seen)
    assert len(seen) == whole[-1][1], "every other pair is read, in every epoch"


def test_what_is_known_to_be_not_finite_is_not_scored_again_and_not_stored(
    tmp_path, tiny_checkpoint, bad, monkeypatch, caplog
):
    data = pairs(tmp_path)
    call = arguments(tmp_path / "x", tiny_checkpoint, bad, data, {"flush_every": 2})
    report = fill_reference(**call)
    assert report["found"] == 0 and report["scored"] == report["needed"]
    warning = next(r.getMessage() for r in caplog.records if "not finite" in r.getMessage())
    assert "2 of 45 rows" in warning and f"{data}:13" in warning and "left out" in warning
    marks = [json.loads(p.read_text()) for p in Path(report["store"]).glob("not-finite-*.json")]
    # Not their neighbours, which a forward with them had spoiled: these were scored again alone.
    assert sum(map(len, marks)) == 2

    count, real = [0], Scoring._forward

    def counted(self, trees, group):
        count[0] += len(group) > 0
        return real(self, trees, group)

    monkeypatch.setattr(Scoring, "_forward", counted)
    again = fill_reference(**call)
    assert again["scored"] == 0 and again["found"] == again["needed"] == report["needed"]
    checked = count[0]  # a sample of the finite ones
    shutil.rmtree(bad.with_name("gone"), ignore_errors=True)
    stored = {"reference": "store", "reference_digest": report["reference"]}
    stored["reference_store"] = report["store"]
    run(tmp_path / "stored", tiny_checkpoint, bad, data, stored | {"reference_checkpoint": None})
    assert count[0] <= 2 * checked
    assert len(listed(tmp_path / "stored" / "data")) == 2


def test_more_than_max_dropped_are_an_error_that_names_the_first(tmp_path, tiny_checkpoint, bad):
    data = pairs(tmp_path, (3, 12, 30))
    with pytest.raises(DataError, match=r"3 of 45 rows .*:4.*6\.7%, more than max_dropped 5\.0%"):
        run(tmp_path / "run", tiny_checkpoint, bad, data)
    with pytest.raises(DataError, match="3 of 45 rows"):
        fill_reference(**arguments(tmp_path / "fill", tiny_checkpoint, bad, data))
    section = PreferenceDatasetConfig(dataset_name=str(data))
    with pytest.raises(DataError, match="3 of 45 rows"):
        score_pairs(str(bad), section, tmp_path / "out.jsonl", max_length=96)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_score_and_evaluate_leave_them_out(tmp_path, tiny_checkpoint, bad):
    data = pairs(tmp_path)
    section = PreferenceDatasetConfig(dataset_name=str(data))
    out = tmp_path / "out.jsonl"
    result = score_pairs(str(tiny_checkpoint), section, out, reference=str(bad), max_length=96)
    assert result["pairs"] == 43 and result["dropped"] == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row.pop("origin") for row in rows] == [
        f"{data}:{line}" for line in range(1, 46) if line not in (13, 31)
    ]
    assert len(rows) == 43 and all(np.isfinite(list(row.values())).all() for row in rows)
    lines = [json.loads(x) for x in (tmp_path / "out.dropped_rows.jsonl").read_text().splitlines()]
    assert [line["origin"] for line in lines] == [f"{data}:13", f"{data}:31"]
    clean = score_pairs(str(tiny_checkpoint), section, out, max_length=96)
    assert clean["pairs"] == 45 and clean["dropped"] == 0
    every = [json.loads(line) for line in out.read_text().splitlines()]
    left = [row for at, row in enumerate(every) if at not in BAD]
    for one, other in zip(rows, left, strict=True):
        assert one["policy_chosen"] == pytest.approx(other["policy_chosen"], abs=1e-4)
    judged = evaluate_pairs(str(tiny_checkpoint), section, reference=str(bad), max_length=96)
    assert judged["dropped"] == 2 and judged["pairs"] == 43


def test_a_source_of_a_mixture_is_judged_by_itself(tmp_path, tiny_checkpoint, bad):
    """2 of 12 rows of the second source are 2 of 99 of both; weights and held-out rows count."""
    (tmp_path / "a").mkdir()
    clean = write_jsonl(tmp_path / "a" / "clean.jsonl", transcripts(87, seed=5))
    rows = transcripts(12, seed=6)
    short = sorted(range(12), key=lambda at: len(rows[at]["rejected"]))  # nothing is cut
    for at in short[:2]:
        rows[at]["rejected"] += "~"
    small = write_jsonl(tmp_path / "small.jsonl", rows)
    sources = [
        MixtureSource(dataset_name=str(clean), weight=2.0),
        MixtureSource(dataset_name=str(small)),
    ]
    for order in (sources, sources[::-1]):
        section = PreferenceDatasetConfig(sources=order, eval_fraction=0.3)
        call = arguments(tmp_path / "fill", tiny_checkpoint, bad, small)
        with pytest.raises(DataError, match=rf"^{small}: 2 of 12 rows .*16\.7%, more than max"):
            fill_reference(**call | {"preference_config": section})
    section = PreferenceDatasetConfig(sources=sources, max_dropped=0.2)
    result = score_pairs(str(bad), section, tmp_path / "out.jsonl", max_length=96)
    assert result["dropped"] == 2 and result["pairs"] == 2 * 87 + 10
