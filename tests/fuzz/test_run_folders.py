"""A damaged run folder in everything that reads one: a result or one error line, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import status_of
from modern_llm.planning.planner import measured_throughput
from modern_llm.report.card import model_card
from modern_llm.report.page import render, write_report
from modern_llm.report.runs import read_runs
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

DEEP = b"[" * 100_000
# name -> bytes, or a function that replaces the path
DAMAGES = {
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "not UTF-8": b'{"step": 1, "loss": "\xff"}\n',
    "number": b"5\n",
    "list": b"[1, 2]\n",
    "null": b"null\n",
    "text": b'"a"\n',
    "cut": b'{"step": 1, "lo',
    "deep": DEEP,
    "deep lines": b'{"a":' * 100_000 + b"\n",
    "not finite": b'{"step": 1, "loss": NaN, "lr": Infinity, "elapsed_s": -Infinity}\n',
    "large numbers": b'{"step": 1e400, "loss": 1e400, "status": 1e400}\n{"step": 2, "loss": 1e300}'
    b'\n{"step": 3, "loss": 1e29, "lr": -1e29}\n',
    "digits": b'{"step": ' + b"9" * 5000 + b', "loss": 1}\n',
    "more digits than a float": b'{"step": 1, "loss": ' + b"9" * 400 + b"}\n",
    "texts for numbers": b'{"step": "1", "loss": "x", "elapsed_s": "y", "status": "0"}\n',
    "truths for numbers": b'{"step": true, "loss": false, "status": false}\n',
    "lists for numbers": b'{"step": [1], "loss": [1], "status": [0], "last_step": {}}\n',
    "missing keys": b"{}\n",
    "other types": b'{"data": 5, "environment": [1], "train": [1], "last_step": "a", "step": 1}\n',
    "types inside": b'{"data": [1, {"rows": "x", "formats": 3, "notes": 1}], "step": 0}\n',
    "negative": b'{"step": -1, "loss": 1, "status": -3, "last_step": -9, "elapsed_s": -5}\n',
    "controls": b'{"step": 1, "reason": "\\u001b[2J\\u202e", "prompt": "\\u001b[2J"}\n',
    "long line": b'{"step": 1, "a": "' + b"x" * 3_000_000 + b'"}\n',
    "nulls": b"\x00" * 5000,
    "yaml bomb": b"a: &a [x,x]\n"
    + b"".join(b"b%d: &a [*a,*a,*a,*a,*a,*a,*a,*a]\n" % n for n in range(30)),
    "yaml odd keys": b"? [1, 2]\n: 3\n2020-01-01: 2020-01-01\n"
    b"train: {1: !!set {a}, 2: !!binary aGk=}\n",
    "yaml sources": b"data: {sources: 5}\ntrain: {run_name: [1]}\nsft_checkpoint: {a: 1}\n",
    "yaml names": b"data: {sources: [{a: 1}, {dataset_name: [1]}]}\ntrain: {run_name: {a: 1}}\n",
    "folder": lambda path: path.mkdir(),
    "full folder": lambda path: (path / "a").mkdir(parents=True),
    "fifo": os.mkfifo,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "endless link": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
}  # fmt: skip
FILES = ("config.yaml", "metrics.jsonl", "samples.jsonl", "outcome.json", "summary.json",
         "warnings.jsonl")  # fmt: skip


def damage(path: Path, name: str) -> None:
    path.unlink(missing_ok=True)
    what = DAMAGES[name]
    path.write_bytes(what) if isinstance(what, bytes) else what(path)


def ends_well(read) -> str:
    """Return the result, or the one error line for the user."""
    try:
        return f"result {read()!r}"
    except Exception as error:
        if status_of(error) not in (2, 3):
            raise
        return f"error {error}"


def page_of(folder: Path, tmp_path: Path, drawn: bool) -> str:
    if drawn:
        write_report([folder], tmp_path / "page.html")
        return (tmp_path / "page.html").read_text()
    return render(read_runs([folder]), [])


def begin(folder: Path, model: Path, pairs: Path) -> Path:
    config = TrainingConfig(
        run_name="r", output_dir=folder, batch_size=4, max_steps=2, save_every=1, log_every=1,
        learning_rate=1e-3, generate_every=1, generate_tokens=2,
    )  # fmt: skip
    return run_dpo(
        model, config, DPOConfig(max_length=96), PreferenceDatasetConfig(dataset_name=str(pairs))
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    os.environ["MODERN_LLM_CACHE"] = str(folder / "cache")
    model = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    pairs = write_jsonl(folder / "pairs.jsonl", transcripts(12))
    begin(folder / "run", model, pairs)
    write_jsonl(folder / "run" / "warnings.jsonl", [{"step": 1, "text": "a", "advice": "b"}])
    assert all((folder / "run" / name).is_file() for name in FILES)
    return folder / "run", model, pairs, folder / "cache"


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_in_a_report_a_card_and_a_plan(name, finished, tmp_path):
    for file in FILES:
        here = shutil.copytree(
            finished[0], tmp_path / file, ignore=shutil.ignore_patterns("data", "checkpoints")
        )
        damage(here / file, name)
        page = ends_well(
            lambda here=here, file=file: page_of(here, tmp_path, file == "metrics.jsonl")
        )
        assert page.startswith("result") or file == "metrics.jsonl", (file, page)
        assert "\x1b" not in page and "\u202e" not in page
        card = ends_well(lambda here=here: model_card(here))
        assert "\x1b" not in card
        ends_well(lambda here=here: measured_throughput(here))


STARTS = ("binary", "list", "deep", "texts for numbers", "fifo", "endless link")  # fmt: skip


def start_damaged(name: str, file: str, finished, tmp_path, monkeypatch) -> None:
    source, model, pairs, cache = finished
    monkeypatch.setenv("MODERN_LLM_CACHE", str(cache))
    here = shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(here / "r_final")
    damage(here / file, name)
    text = ends_well(lambda: begin(here, model, pairs))
    assert text.startswith("result") or f"{here}" in text, text
    if isinstance(DAMAGES[name], bytes) and file != "config.yaml":
        assert text.startswith("result"), text
        json.loads((here / "outcome.json").read_text())
    if not isinstance(DAMAGES[name], bytes):
        assert "remove it" in text


@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "outcome.json"])
def test_a_start_in_a_damaged_folder(name, file, finished, tmp_path, monkeypatch):
    start_damaged(name, file, finished, tmp_path, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, ".lock", "token_budget.json"])
def test_a_start_with_every_file_damaged(name, file, finished, tmp_path, monkeypatch):
    start_damaged(name, file, finished, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["list", "deep", "fifo", "loop"])
@pytest.mark.parametrize("file", ["MANIFEST.json", "state.json"])
def test_a_start_from_a_damaged_checkpoint(name, file, finished, tmp_path, monkeypatch):
    """The only checkpoint is damaged: the run does not silently start over."""
    source, model, pairs, cache = finished
    monkeypatch.setenv("MODERN_LLM_CACHE", str(cache))
    here = shutil.copytree(source, tmp_path / "run")
    shutil.rmtree(here / "r_final")
    newest = sorted((here / "checkpoints").iterdir())[-1]
    damage(newest / file, name)
    text = ends_well(lambda: begin(here, model, pairs))
    assert text.startswith("error") and "none of 1 checkpoints is intact" in text
