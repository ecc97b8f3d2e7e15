"""A run that is stopped anywhere and started again by the same call ends with the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import Stopped, StorageError, UserError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.models import head
from modern_llm.storage import atomic
from modern_llm.training import loop
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.steps import broken_at


def call(folder: Path, checkpoint, pairs, **changes) -> Path:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 4, "max_steps": 9, "log_every": 1,
        "save_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    return run_dpo(
        checkpoint,
        TrainingConfig(**(fields | changes)),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )


def numbers(folder: Path) -> list[tuple]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in map(json.loads, lines)]


def same(a: Path, b: Path) -> bool:
    one, two = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == two.keys() and all((one[n] == two[n]).all() for n in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_checkpoint, tiny_pairs):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, call(folder, tiny_checkpoint, tiny_pairs)


@pytest.mark.slow
def test_a_resumed_run_keeps_the_chunks_of_the_head(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    """On a GPU their size follows free memory, which may differ when the run is resumed."""
    monkeypatch.setattr(head, "chunk_rows", lambda *of: 7)
    whole = call(tmp_path / "whole", tiny_checkpoint, tiny_pairs, max_steps=5)
    with broken_at(4), pytest.raises(KeyboardInterrupt):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=5)
    monkeypatch.setattr(head, "chunk_rows", lambda *of: 3)
    final = call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=5)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000004" / "MANIFEST.json"
    assert json.loads(manifest.read_text())["facts"]["head_rows"] == [7]
    assert same(final, whole) and numbers(tmp_path / "run") == numbers(tmp_path / "whole")


@pytest.mark.parametrize("stop_after", [1, 4, 5])
def test_an_interrupted_run_resumes_to_the_same_end(
    tmp_path, tiny_checkpoint, tiny_pairs, undisturbed, stop_after
):
    folder, final = undisturbed
    with broken_at(stop_after), pytest.raises(KeyboardInterrupt):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    again = call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert same(again, final)
    assert numbers(tmp_path / "run") == numbers(folder)


def test_a_damaged_checkpoint_is_skipped(
    tmp_path, tiny_checkpoint, tiny_pairs, undisturbed, caplog
):
    folder, final = undisturbed
    call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    for path in (tmp_path / "run" / "r_final").iterdir():
        path.unlink()
    assert same(call(tmp_path / "run", tiny_checkpoint, tiny_pairs), final)
    assert any("damaged" in r.message for r in caplog.records)
    assert numbers(tmp_path / "run") == numbers(folder)

    for place in (tmp_path / "run" / "checkpoints").iterdir():
        (place / "MANIFEST.json").unlink()
    (tmp_path / "run" / "outcome.json").unlink()
    with pytest.raises(StorageError, match="none of .* is intact"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)


def test_a_checkpoint_that_the_disk_cannot_read_is_skipped(
    tmp_path, tiny_checkpoint, tiny_pairs, undisturbed, monkeypatch, caplog
):
    folder, final = undisturbed
    call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    for path in (tmp_path / "run" / "r_final").iterdir():
        path.unlink()
    (tmp_path / "run" / "outcome.json").unlink()
    real = atomic.digest_file

    def fails(path, *args):
        if path.parent == newest and path.name.startswith("optimizer"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args)

    monkeypatch.setattr(atomic, "digest_file", fails)
    assert same(call(tmp_path / "run", tiny_checkpoint, tiny_pairs), final)
    assert f"{newest.name} is damaged and skipped: [Errno 5]" in caplog.text
    assert numbers(tmp_path / "run") == numbers(folder)


def test_a_finished_run_is_not_repeated_and_another_is_not_mixed_in(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    final = call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=2)
    stamp = (final / "model.safetensors").stat().st_mtime_ns
    assert call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=2, log_every=7) == final
    assert (final / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=2, learning_rate=0.5)
    with pytest.raises(UserError, match="never"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=2, resume="never")
    with pytest.raises(UserError, match="holds no run"):
        call(tmp_path / "none", tiny_checkpoint, tiny_pairs, resume="must")


def test_a_finished_run_without_a_checkpoint_is_not_trained_again_over_its_files(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    few = {"max_steps": 2, "save_every": 100}
    final = call(tmp_path / "run", tiny_checkpoint, tiny_pairs, **few)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    longer = {**few, "max_steps": 4}
    for accept in (False, True):
        with pytest.raises(UserError, match=r"max_steps: 2 -> 4 .*finished and has no checkpoint"):
            call(tmp_path / "run", tiny_checkpoint, tiny_pairs, **longer, accept_change=accept)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    assert call(tmp_path / "run", tiny_checkpoint, tiny_pairs, **few, accept_change=True) == final


def test_only_the_newest_checkpoints_are_kept(tmp_path, tiny_checkpoint, tiny_pairs):
    call(tmp_path / "run", tiny_checkpoint, tiny_pairs, keep_checkpoints=1)
    kept = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-00000008"]


@pytest.mark.slow
def test_a_signal_saves_ends_with_75_and_the_same_command_resumes(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    settings = {
        "sft_checkpoint": str(tiny_checkpoint),
        "train": {
            "run_name": "r", "output_dir": str(tmp_path / "run"), "batch_size": 4,
            "max_steps": 400, "log_every": 1, "save_every": 1000, "learning_rate": 1e-4,
        },
        "dpo": {"max_length": 96},
        "data": {"dataset_name": str(tiny_pairs)},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "modern_llm", "dpo", "--config", str(tmp_path / "run.yaml")]
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if line.startswith("step=3 "):
                process.send_signal(signal.SIGTERM)
                break
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, errors
    assert "modern-llm: error: stopped by SIGTERM" in errors
    assert "Traceback" not in errors
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    facts = json.loads((saved / "MANIFEST.json").read_text())["facts"]
    assert outcome["status"] == 75
    assert facts["step"] == outcome["last_step"] >= 3

    settings["train"]["log_every"] = 1
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "--resume"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        first = next(line for line in process.stdout if line.startswith("step="))
    finally:
        process.kill()
        process.communicate()
    assert first.startswith(f"step={facts['step'] + 1} ")
    assert time.monotonic() - began < 120


def test_a_file_stop_saves_and_the_same_call_resumes(
    tmp_path, tiny_checkpoint, tiny_pairs, undisturbed, monkeypatch
):
    folder, final = undisturbed
    real = loop._optimizer_step

    def touches(*args):
        if args[1] == 2:
            (tmp_path / "run" / "STOP").touch()
        return real(*args)

    monkeypatch.setattr(loop, "_optimizer_step", touches)
    with pytest.raises(Stopped, match="stopped by the file STOP after step 3, saved"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    monkeypatch.setattr(loop, "_optimizer_step", real)
    again = call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert same(again, final) and numbers(tmp_path / "run") == numbers(folder)
