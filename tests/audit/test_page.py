"""The audit's page is what its results say, and its checks tell a bad trainer from a good one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
AUDIT = ROOT / "audit"
if not AUDIT.is_dir():
    pytest.skip("the source distribution has no audit", allow_module_level=True)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The audit's modules are scripts beside each other: importable only from their folder."""
    monkeypatch.syspath_prepend(str(AUDIT))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(AUDIT) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_page_equals_its_generation_from_the_committed_results():
    import page

    expected = page.page(page.read())
    assert page.PAGE.read_text("utf-8") == expected, "run python audit/page.py"


def test_every_result_is_whole_and_of_a_known_check():
    import frame
    import page
    from checks import NAMES

    cells = page.read()
    assert cells
    for (trainer, check), cell in cells.items():
        assert check in (*NAMES, "install") and trainer in page.PACKAGES
        assert cell["verdict"] in frame.VERDICTS
        assert cell["sentence"] and cell["command"].startswith("python ")
        assert {"version", "figures", "seconds"} <= cell.keys()


def test_every_check_says_what_it_asks():
    import importlib

    from checks import NAMES

    listed = {path.stem for path in (AUDIT / "checks").glob("*.py")} - {"__init__"}
    assert listed == set(NAMES)
    for name in NAMES:
        module = importlib.import_module(f"checks.{name}")
        assert module.TITLE and callable(module.run)
        assert "\n\n" in module.__doc__.strip()


def test_a_trainer_that_cannot_be_installed_runs_nowhere():
    import page

    install = {"verdict": "does not run here", "figures": {"not_for": ["packing"]}}
    cells = {("openrlhf", "install"): install}
    assert page.verdict(cells, "openrlhf", "resume") == "does not run here"
    assert page.verdict(cells, "openrlhf", "packing") == "not run"
    assert page.verdict(cells, "trl", "resume") == "not run"


class Scripted:
    """A trainer whose answers are given: a function of operation and request."""

    name, real_model = "trl", None

    def __init__(self, answer):
        self._answer = answer

    def call(self, operation, processes=1, **request):
        return self._answer(operation, processes, request)

    def attempt(self, operation, processes=1, **request):
        return self._answer(operation, processes, request)


@pytest.mark.parametrize(("loss", "verdict"), [(0.69314718, "holds"), (0.6941, "fails")])
def test_the_first_loss_is_judged(loss, verdict, tmp_path):
    from checks import step_one

    found = step_one.run(Scripted(lambda *_: {"losses": [loss]}), tmp_path)
    assert found.verdict == verdict


@pytest.mark.parametrize(("norm", "verdict"), [(2.0, "holds"), (2.01, "fails")])
def test_a_leak_between_packed_rows_is_judged(norm, verdict, tmp_path):
    from checks import packing

    def answer(operation, processes, request):
        return {"losses": [3.0], "norms": [norm if request.get("packing") else 2.0]}

    assert packing.run(Scripted(answer), tmp_path).verdict == verdict


def test_another_loss_on_two_processes_is_judged(tmp_path):
    from checks import world_size

    def answer(operation, processes, request):
        return {"losses": [0.6] * 5, "norms": [1.0 + 0.01 * (processes == 2)] * 5}

    assert world_size.run(Scripted(answer), tmp_path).verdict == "fails"


def test_a_stale_reference_is_judged_and_named(tmp_path):
    from checks import reference_cache

    def answer(operation, processes, request):
        assert request["model"] and request["rows"]
        stale = request.get("max_length") == 32
        return {"losses": [0.7 if stale else 0.693147], "scored": 0}

    found = reference_cache.run(Scripted(answer), tmp_path)
    assert found.verdict == "fails" and "other truncation" in found.sentence


def test_unequal_prompts_after_truncation_are_judged(tmp_path):
    from checks import truncation

    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    same = Scripted(lambda *_: {"rows": [row]})
    other = Scripted(lambda *_: {"rows": [row | {"prompt_of_rejected_ids": [9]}]})
    assert truncation.run(same, tmp_path).verdict == "holds"
    assert truncation.run(other, tmp_path).verdict == "fails"


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        ("error: rows.jsonl:23: no response", 2, "named"),
        ("ValueError: JSON parse error in row 22", 1, "named"),
        ("KeyError: 'rejected' at Question 22", 1, "named"),
        (
            '  File "x.py", line 23, in train\nKeyError: rejected',
            1,
            "an error that does not name it",
        ),
        ("step 23", 0, "trained without a word"),
    ],
)
def test_how_a_bad_row_is_told(text, status, told):
    from checks import bad_row
    from frame import Attempt

    answer = {} if status else {"losses": []}
    assert bad_row.told(Attempt(status, answer, text), "Question 22") == told


def test_a_kill_comes_at_the_asked_change_of_the_watched_save(tmp_path):
    """The window counts writes in the folder, and neither reads nor other folders."""
    import subprocess

    program = f"""
import os, sys; sys.path.insert(0, {str(AUDIT)!r})
from serve import SaveWindow, step_done
inside, outside = {str(tmp_path / "in")!r}, {str(tmp_path / "out")!r}
os.mkdir(inside); os.mkdir(outside)
request = {{"watched_save": 6}}
window = SaveWindow(inside, int(sys.argv[1]))
step_done(request, window, 3)
open(inside + "/early", "w").close()
step_done(request, window, 6)
open(outside + "/x", "w").close()
open(inside + "/a", "w").close(); open(inside + "/a").close()
os.rename(inside + "/a", inside + "/b")
step_done(request, window, 7)
open(inside + "/late", "w").close()
print(window.count)
"""
    run = [sys.executable, "-c", program]
    done = subprocess.run([*run, "0"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]
    for name in ("in", "out"):
        for path in (tmp_path / name).iterdir():
            path.unlink()
        (tmp_path / name).rmdir()
    killed = subprocess.run([*run, "2"], capture_output=True, text=True)
    assert killed.returncode == -9
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a", "early"]


def test_a_result_that_is_written_is_the_one_that_is_read(tmp_path):
    import page
    import run

    cell = {"trainer": "trl", "check": "resume", "verdict": "holds"}
    run.write(cell, tmp_path)
    assert json.loads((tmp_path / "trl-resume.json").read_text()) == cell
    assert page.read(tmp_path) == {("trl", "resume"): cell}
