"""The checks of `doctor`: each finds the fault that is put before it."""

from __future__ import annotations

import os
import time

import pytest

from modern_llm.distributed import build_locks
from modern_llm.verbs import doctor_checks


def test_versions_are_those_that_are_imported():
    import torch
    import transformers

    found = doctor_checks.versions().found
    assert f"torch {torch.__version__}" in found
    assert f"transformers {transformers.__version__}" in found


def test_a_lock_without_a_build_is_stale_and_named(tmp_path, monkeypatch):
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("")
    monkeypatch.setattr(build_locks, "oldest_compiler", lambda: None)
    (check,) = doctor_checks.locks([tmp_path])
    assert check.state == "problem" and str(lock) in check.found and str(lock) in check.cure


def test_a_lock_younger_than_a_running_compiler_is_held(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    lock.write_text("")
    monkeypatch.setattr(build_locks, "oldest_compiler", lambda: 60.0)
    (check,) = doctor_checks.locks([tmp_path])
    assert check.state == "ok" and "1 held" in check.found
    before = time.time() - 600
    os.utime(lock, (before, before))
    (check,) = doctor_checks.locks([tmp_path])
    assert check.state == "problem"


def test_a_place_that_does_not_exist_yet_is_judged_by_what_is_above(tmp_path):
    place = tmp_path / "a" / "b"
    assert doctor_checks.writable(place).state == "ok"
    assert doctor_checks.disk(place).found.endswith("GB free")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    check = doctor_checks.writable(tmp_path / "file" / "run")
    assert check.state == "problem" and "Not a directory" in check.found


def test_a_full_disk_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_checks, "LOW_DISK_GB", 10**9)
    assert doctor_checks.disk(tmp_path).state == "note"


def test_the_hub_that_is_switched_off_is_a_note():
    assert "HF_HUB_OFFLINE" in doctor_checks.hub().found


def test_two_processes_meet():
    check = doctor_checks.process_group()
    assert (check.state, check.found) == ("ok", "two processes over gloo")


def test_processes_that_cannot_meet_are_a_problem(monkeypatch):
    monkeypatch.setattr(doctor_checks, "GROUP", "raise SystemExit('no route to host')")
    check = doctor_checks.process_group()
    assert check.state == "problem" and "no route to host" in check.found


@pytest.mark.parametrize("state", ["ok", "problem"])
def test_results_count_problems(state):
    result = doctor_checks.as_result([doctor_checks.Check("a", state, "b", "c")])
    assert result["problems"] == (state == "problem")
    assert result["checks"] == [{"name": "a", "state": state, "found": "b", "cure": "c"}]
