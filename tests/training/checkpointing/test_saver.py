"""A failed save keeps the previous checkpoint; the run continues, and ends with 3 if it must."""

from __future__ import annotations

import json
import logging

import pytest

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import StorageError
from modern_llm.storage import fault_points
from modern_llm.storage.atomic import committed_folder, verified_manifest
from modern_llm.training.checkpointing import format, saver
from modern_llm.training.train_dpo import DPOConfig, run_dpo


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(fault_points, "_reached", {})


def call(folder, model, pairs, **changes):
    fields = {"batch_size": 4, "max_steps": 5, "save_every": 1, "log_every": 1, **changes}
    config = TrainingConfig(run_name="r", output_dir=folder, learning_rate=1e-4, **fields)
    section = PreferenceDatasetConfig(dataset_name=str(pairs))
    return run_dpo(model, config, DPOConfig(max_length=96), section)


@pytest.mark.parametrize("action", ["enospc", "eio", "estale", "edquot", "erofs"])
@pytest.mark.parametrize("point", ["folder.make", "tensors.write", "manifest.write",
                                   "file.flush", "commit.rename"])  # fmt: skip
def test_a_failed_commit_keeps_the_previous_content(tmp_path, monkeypatch, point, action):
    def write(text):
        with committed_folder(tmp_path / "a", {}) as place:
            with fault_points.around("tensors.write"):
                (place / "one").write_text(text)

    write("old")
    monkeypatch.setenv(fault_points.VARIABLE, f"{point}.before:0:1:{action}")
    with pytest.raises(StorageError, match="cannot write"):
        write("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert verified_manifest(tmp_path / "a") == {}
    assert (tmp_path / "a" / "one").read_text() == "old"
    write("new")  # the fault was injected only once
    assert (tmp_path / "a" / "one").read_text() == "new"


def test_one_failed_save_is_a_warning_and_the_run_succeeds(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch, caplog
):
    monkeypatch.setenv(fault_points.VARIABLE, "state.write.before:0:2:enospc")
    call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert any("checkpoint of step 2 failed" in r.message for r in caplog.records)
    places = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in places] == ["step-00000003", "step-00000004"]
    facts = verified_manifest(places[-1])
    assert facts["step"] == 4 and facts["examples"] == 16 and facts["world"] == 1
    assert {"configuration", "model", "tokenizer", "data"} <= set(facts)


def test_three_consecutive_failed_saves_end_the_run_with_3(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch, caplog
):
    real, saves = format.save, []

    def refuses(runtime, folder, step, *rest):
        saves.append(step)
        if step > 1:
            raise StorageError("cannot write: No space left on device")
        real(runtime, folder, step, *rest)

    monkeypatch.setattr(format, "save", refuses)
    with pytest.raises(StorageError, match="No space"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert saves == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == 3
    verified_manifest(tmp_path / "run" / "checkpoints" / "step-00000001")


def test_a_run_that_does_not_fit_on_the_disk_is_refused_before_its_first_step(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    monkeypatch.setattr(saver, "free_bytes", lambda folder: 1000)
    with pytest.raises(StorageError, match="MB are free"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_save_slower_than_the_launchers_limit_is_a_warning_at_the_start(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch, caplog
):
    monkeypatch.setattr(saver, "GRACE_S", 0.0)
    with caplog.at_level(logging.WARNING):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=1)
    assert any("torchrun leaves after SIGTERM" in r.message for r in caplog.records)


def test_only_checkpoints_that_verify_count_as_kept(tmp_path):
    for step in range(1, 6):
        with committed_folder(tmp_path / f"step-{step:08d}", {"step": step}) as place:
            (place / "one").write_text("1")
    for step in (3, 5):
        (tmp_path / f"step-{step:08d}" / "one").write_text("2")
    format.retire(tmp_path, 2, set())
    assert [int(p.name[5:]) for p in sorted(tmp_path.iterdir())] == [2, 3, 4, 5]
