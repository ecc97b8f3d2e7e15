"""Processes whose work is done end with status 0, independent of gloo's threads.

Each pair is forked with everything imported and ends through Python's own exit. The fault: a late
worker thread of gloo needs the interpreter while Python finalises, and the process aborts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("ddp", "ddp-background", "zero2", "zero2-background")

pytestmark = pytest.mark.skipif(
    not hasattr(os, "SCHED_IDLE") or not Path("/proc/self/task").is_dir(),
    reason="scheduling classes and lists of threads are Linux's",
)


def endings(folder: Path, *arguments: str, seconds: float) -> list[list[int]]:
    """Return [pair, rank, status] of the processes that did not end with 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.endings", str(folder), *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_late_workers_do_not_abort_a_finished_script(tmp_path):
    assert endings(tmp_path, "script", "groups", "3", "starved", seconds=150) == []


@pytest.mark.slow
@pytest.mark.parametrize("way", ["script", "command"])
def test_a_run_with_late_workers_ends_well(tmp_path, way):
    assert endings(tmp_path, way, "ddp-background", "2", "starved", seconds=200) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["script", "command"])
def test_many_runs_at_idle_priority_end_well(tmp_path, way, kind):
    if "zero2" in kind:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    assert endings(tmp_path, way, kind, "25", seconds=3000) == []
