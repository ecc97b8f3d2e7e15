"""A background save writes the same bytes as a foreground save, delays no step, and loses
nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from modern_llm.config.errors import Stopped, StorageError
from modern_llm.storage.atomic import verified_manifest
from modern_llm.training.checkpointing import format
from tests.helpers.forks import fork_server
from tests.helpers.small import MODULES, STEPS, numbers, run_small
from tests.training.test_fault_campaign import final, start

SETTINGS = {"background_saving": True, "keep_checkpoints": 9}


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("logs"), *MODULES) as server:
        yield server


def content(folder: Path) -> dict[str, bytes]:
    """Return every byte of every checkpoint, by file name; each checkpoint verifies."""
    for place in (folder / "checkpoints").iterdir():
        verified_manifest(place)
    files = (path for path in (folder / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), [(1, None), (2, None), (2, 2)])
def test_checkpoints_equal_those_of_the_foreground_byte_for_byte(tmp_path, forks, world, stage):
    if stage is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    for name in ("beside", "before"):
        settings = SETTINGS | {"background_saving": name == "beside"}
        found = start(forks, tmp_path / name, world, "", stage, "", settings)
        assert found == [0] * world, forks.jobs[-1].text
    beside, before = content(tmp_path / "beside"), content(tmp_path / "before")
    assert beside == before
    steps = {name.split("/")[1] for name in beside}
    assert steps == {f"step-{step:08d}" for step in range(1, STEPS)}
    facts = verified_manifest(tmp_path / "beside" / "checkpoints" / "step-00000003")
    assert facts["world"] == world
    assert len([name for name in beside if "00000003/model" in name]) == (2 if stage else 1)
    assert numbers(tmp_path / "beside") == numbers(tmp_path / "before")
    assert final(tmp_path / "beside") == final(tmp_path / "before")


def slow(monkeypatch, seconds: float) -> list[tuple[int, int]]:
    """Delay the write of each file; return the steps logged before and after each write."""
    real, steps = format.write_tensors, []

    def written(path, *args):
        if threading.current_thread().name.startswith("saving"):
            run = path.parents[2]
            before = len(numbers(run))
            time.sleep(seconds)
            steps.append((before, len(numbers(run))))
        real(path, *args)

    monkeypatch.setattr(format, "write_tensors", written)
    return steps


def test_training_continues_while_a_slow_disk_is_written_to(tmp_path, monkeypatch):
    steps = slow(monkeypatch, 0.3)
    run_small(tmp_path, max_steps=9, save_every=3, **SETTINGS)
    assert len(steps) == 4 and steps[0][1] == 6 and steps[-1][1] == 9
    assert {name.split("/")[1] for name in content(tmp_path)} == {"step-00000003", "step-00000006"}
    assert [record[0] for record in numbers(tmp_path)] == list(range(1, 10))


def test_a_stop_waits_for_the_background_save_and_saves_again(tmp_path, monkeypatch):
    slow(monkeypatch, 0.3)
    real = format.snapshot

    def signalled(runtime, step, *state, **options):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(runtime, step, *state, **options)

    monkeypatch.setattr(format, "snapshot", signalled)
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 3, saved"):
        run_small(tmp_path, save_every=2, max_steps=8, **SETTINGS)
    assert {name.split("/")[1] for name in content(tmp_path)} == {"step-00000002", "step-00000003"}
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == 75
    assert [record[0] for record in numbers(tmp_path)] == [1, 2, 3]


def test_three_consecutive_failures_end_the_run_with_3_as_in_the_foreground(
    tmp_path, monkeypatch, caplog
):
    real, saves = format.commit, []

    def refuses(peers, folder, step, *rest):
        saves.append(step)
        if step not in (1, 4):
            raise StorageError("cannot write: No space left on device")
        real(peers, folder, step, *rest)

    monkeypatch.setattr(format, "commit", refuses)
    with pytest.raises(StorageError, match="No space"):
        run_small(tmp_path, max_steps=20, **SETTINGS)
    assert saves[:7] == [1, 2, 3, 4, 5, 6, 7]
    failed = [r.getMessage() for r in caplog.records if "failed (cannot write" in r.getMessage()]
    assert [line.split()[4] for line in failed] == ["2", "3", "5", "6"]
    assert ["1 of 3" in line for line in failed] == [True, False, True, False]
    assert {name.split("/")[1] for name in content(tmp_path)} == {"step-00000001", "step-00000004"}
    assert json.loads((tmp_path / "outcome.json").read_text())["status"] == 3


@pytest.mark.slow
def test_a_save_that_hangs_is_named_by_the_watchdog(tmp_path, forks):
    world = 2
    settings = SETTINGS | {"save_every": 2, "max_steps": 5, "hang_timeout": 2.0}
    fault = "tensors.write.before:0:1:sleep"
    found = start(forks, tmp_path / "run", world, fault, None, "", settings)
    assert found == [5] * world, forks.jobs[-1].text
    said = "".join(job.text for job in forks.jobs[-world:])
    assert "no progress for" in said and "rank 0" in said, said
    # Named by itself, or by the training that waits for it.
    assert re.search("(background save|waiting for the save) of step 2", said), said
    # Training continued until something had to wait for the disk.
    assert [record[0] for record in numbers(tmp_path / "run")] == [1, 2, 3, 4]
    assert "rank 1" not in said.split("no progress")[0]
