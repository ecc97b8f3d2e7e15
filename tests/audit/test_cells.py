"""Cells of the audit, run for real: two of this package, under `long` all of it and of TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AUDIT = ROOT / "audit"
if not AUDIT.is_dir():
    pytest.skip("the source distribution has no audit", allow_module_level=True)
MEASURED = ("holds", "measured")


def cells(folder: Path, *words: str) -> dict[str, dict]:
    """Run cells; return their results by check."""
    command = [sys.executable, str(AUDIT / "run.py"), "--results", str(folder), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    assert found, done.stderr
    return {cell["check"]: cell for cell in found}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_cells_of_this_package_hold(tmp_path):
    checks = ("step_one", "bad_row")
    found = cells(tmp_path, "--trainer", "modern_llm", "--check", *checks)
    assert {name: cell["verdict"] for name, cell in found.items()} == dict.fromkeys(checks, "holds")


@pytest.mark.slow
def test_an_unknown_check_is_one_line(tmp_path):
    words = [sys.executable, str(AUDIT / "run.py"), "--check", "speeed"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no check speeed" in done.stderr.splitlines()[-1]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_cell_of_this_package_holds(tmp_path):
    found = cells(tmp_path, "--trainer", "modern_llm")
    assert found.pop("speed")["verdict"] == "does not run here"  # no real model was given
    assert {cell["verdict"] for cell in found.values()} == {"holds"}, found


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_cell_of_trl_has_the_committed_verdict(tmp_path):
    environments = os.environ.get("MODERN_LLM_AUDIT_ENVIRONMENTS")
    if not environments:
        pytest.skip("MODERN_LLM_AUDIT_ENVIRONMENTS names the folder of audit/environments.py")
    found = cells(tmp_path, "--trainer", "trl", "--environments", environments)
    for check, cell in found.items():
        committed = AUDIT / "results" / f"trl-{check}.json"
        if check != "speed" and committed.exists():
            assert cell["verdict"] == json.loads(committed.read_text("utf-8"))["verdict"], cell
