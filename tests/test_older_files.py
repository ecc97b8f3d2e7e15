"""Runs, checkpoints and reference stores written by version 0.1 resume and are read.

`written_by_0_1` holds a run that was interrupted after 2 of 4 steps, its store and its inputs, as
the code before the change of layout wrote them; `expected.jsonl` is the undisturbed run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.reference.store.paths import stores_in
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.report.page import write_report
from modern_llm.training.train_dpo import DPOConfig, run_dpo

OLD = Path(__file__).parent / "written_by_0_1"
EXACT = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "grad_norm", "lr")


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, which is the working directory: the run names its inputs by it."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MODERN_LLM_CACHE", "cache")
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_run_resumes_with_its_stored_reference(old, caplog):
    caplog.set_level("INFO")
    final = run_dpo(
        "model",
        TrainingConfig(
            run_name="old", output_dir=Path("run"), batch_size=4, max_steps=4, save_every=2,
            log_every=1, learning_rate=1e-3, tokens_per_micro_batch=300, seed=3,
        ),
        DPOConfig(max_length=64),
        PreferenceDatasetConfig(dataset_name="pairs.jsonl"),
    )  # fmt: skip
    assert "step-00000002" in caplog.text and "nothing was computed" in caplog.text
    found, expected = records(old / "run" / "metrics.jsonl"), records(old / "expected.jsonl")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for one, other in zip(found, expected, strict=True):
        assert {n: one[n] for n in EXACT} == pytest.approx({n: other[n] for n in EXACT}, rel=1e-5)
    AutoModelForCausalLM.from_pretrained(final)


def test_the_store_is_read(old):
    (folder,) = stores_in(Path("cache"))
    assert ReferenceStore.open(folder).verify() == (1, [])


def test_the_run_folder_is_reported(old):
    page = write_report([Path("run")], Path("run.html"))["report"]
    assert "old" in Path(page).read_text()
