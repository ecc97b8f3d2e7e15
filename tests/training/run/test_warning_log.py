"""`warnings.jsonl`: what a run warned of, once, bounded, and only while it may write."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.training.monitoring import diagnostics
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.warning_log import MAX_WARNINGS, WarningLog
from modern_llm.training.train_dpo import DPOConfig, run_dpo

log = logging.getLogger("modern_llm.training.monitoring.monitor")


def make(folder: Path, *, is_open: bool = True) -> tuple[RunFolder, WarningLog]:
    config = TrainingConfig(run_name="r", output_dir=folder)
    run = RunFolder(config, {"train": {"run_name": "r"}})
    if is_open:
        run.open()
    return run, WarningLog(run)


def kept(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]


@pytest.fixture
def collect():
    started = []

    def start(warnings: WarningLog) -> None:
        warnings.start()
        started.append(warnings)

    yield start
    for warnings in started:
        warnings.stop()


def test_a_warning_is_kept_with_step_symptom_and_advice(tmp_path, collect):
    run, warnings = make(tmp_path)
    collect(warnings)
    log.info("no warning; none")
    log.warning("warning: %s", "step 7: the gradient is 0; lower dpo.beta; or not")
    run.done = 9
    log.warning("old checkpoints\n\x1b[2J could not be removed")
    logging.getLogger("modern_llm.report.runs").warning("x: cannot be read")
    logging.getLogger("elsewhere").warning("x")
    assert kept(tmp_path) == [
        {"step": 7, "text": "the gradient is 0", "advice": "lower dpo.beta; or not"},
        {"step": 9, "text": "old checkpoints \\x1b[2J could not be removed", "advice": ""},
    ]


def test_a_repeated_warning_is_kept_once_and_the_file_is_bounded(tmp_path, collect):
    _, warnings = make(tmp_path)
    collect(warnings)
    for number in range(3 * MAX_WARNINGS):
        log.warning("warning: step %d: the same; x", number)
        log.warning("number %d", number)
    assert len(kept(tmp_path)) == MAX_WARNINGS
    assert [w["text"] for w in kept(tmp_path)[:3]] == ["the same", "number 0", "number 1"]


def test_a_resumed_run_keeps_its_warnings_and_one_that_starts_over_does_not(tmp_path, collect):
    run, warnings = make(tmp_path)
    collect(warnings)
    log.warning("first")
    warnings.stop()
    (run.checkpoints / "step-00000002").mkdir()
    with (tmp_path / "warnings.jsonl").open("a") as file:
        file.write('{"step": 3, "te')  # killed while it wrote
    _, again = make(tmp_path)
    collect(again)
    log.warning("first")
    log.warning("second")
    again.stop()
    assert [w["text"] for w in kept(tmp_path)] == ["first", "second"]
    (run.checkpoints / "step-00000002").rmdir()
    _, over = make(tmp_path)
    collect(over)
    over.flush()
    assert not (tmp_path / "warnings.jsonl").exists()


def test_nothing_is_written_before_the_folder_is_open_nor_after_the_lock_is_lost(
    tmp_path, collect, monkeypatch
):
    run, warnings = make(tmp_path / "run", is_open=False)
    collect(warnings)
    log.warning("early")
    assert not (tmp_path / "run").exists()
    run.open()
    log.warning("later")
    monkeypatch.setattr(run.lock, "is_lost", lambda: True)
    log.warning("too late")
    assert [w["text"] for w in kept(tmp_path / "run")] == ["early", "later"]


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path, collect):
    _, warnings = make(tmp_path)
    (tmp_path / "warnings.jsonl").mkdir()
    collect(warnings)
    log.warning("printed all the same")


def test_a_real_run_records_its_warnings_and_what_differs_from_the_defaults(
    tmp_path, monkeypatch, tiny_checkpoint, tiny_pairs
):
    monkeypatch.setattr(diagnostics, "SMALL", 0)
    before = list(logging.getLogger("modern_llm").handlers)
    config = TrainingConfig(
        run_name="r", output_dir=tmp_path / "r", batch_size=4, max_steps=2, learning_rate=1e-3
    )
    data = PreferenceDatasetConfig(dataset_name=str(tiny_pairs))
    run_dpo(tiny_checkpoint, config, DPOConfig(max_length=96), data)
    assert logging.getLogger("modern_llm").handlers == before
    (warning,) = kept(tmp_path / "r")
    assert warning["step"] == 0 and "train.learning_rate 0.001 is above" in warning["text"]
    assert warning["advice"].startswith("try 5e-6 for DPO")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert sorted(summary["changed"]) == [
        "data.dataset_name", "dpo.max_length", "train.batch_size", "train.learning_rate",
        "train.max_steps",
    ]  # fmt: skip
    assert "train.learning_rate 0.001 is above" in (tmp_path / "r" / "report.html").read_text()
    config = TrainingConfig(run_name="r", output_dir=tmp_path / "s", batch_size=4, max_steps=2)
    run_dpo(tiny_checkpoint, config, DPOConfig(max_length=96), data)
    assert not (tmp_path / "s" / "warnings.jsonl").exists()
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert "train.learning_rate" not in summary["changed"]


def test_a_link_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    (tmp_path / "warnings.jsonl").symlink_to(tmp_path / "x")
    run, _ = make(tmp_path, is_open=False)
    with pytest.raises(ValueError, match="warnings.jsonl: a run writes a regular file"):
        run.refuse_odd_files()
