"""Every benchmark of speed and memory runs: tiny sizes, generated data, and its verdicts."""

from __future__ import annotations

import importlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(FOLDER))

import bench_trees  # noqa: E402
from measuring import Figure, read_lines, spread  # noqa: E402

RUNS = {
    "bench_dpo_trl.py": (["--only_ours", "--steps=2", "--repeats=1"], 0),
    "bench_trees.py": (["--kinds=grouped", "--steps=2", "--repeats=1"], 1),
    "bench_mixers.py": (["--models=lfm2", "--pairs=2", "--repeats=1"], 2),
    "bench_model.py": (["--steps=2", "--repeats=1"], 2),
    "bench_data.py": (["--pairs=200", "--repeats=1"], 2),
    "bench_loop.py": (["--steps=3", "--repeats=1"], 1),
}


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory) -> Path:
    """Transcripts of random words, in the format of HH-RLHF."""
    draw, words = (
        random.Random(0),
        "the a rain sun green old sings runs house over under why".split(),
    )
    rows = []
    for _ in range(48):
        text, *answers = (" ".join(draw.choices(words, k=n)) for n in (12, 14, 15))
        prompt = f"\n\nHuman: {text}?\n\nAssistant:"
        rows.append({"chosen": f"{prompt} {answers[0]}", "rejected": f"{prompt} {answers[1]}"})
    file = tmp_path_factory.mktemp("data") / "hh.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [s if s == "bench_loop.py" else pytest.param(s, marks=pytest.mark.long) for s in RUNS],
)
def test_a_benchmark_runs_and_prints_its_requirements(script, transcripts):
    words, figures = RUNS[script]
    done = subprocess.run(
        [sys.executable, FOLDER / script, f"--data={transcripts}", "--threads=1", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "(required " in line]
    assert len(told) == figures, done.stdout
    assert all(line.endswith(("reached", "MISSED")) for line in told)


@pytest.mark.slow
def test_the_benchmark_of_a_real_model_runs(transcripts, tiny_checkpoint):
    words = ["--only_ours", "--steps=2", "--batch=4", "--repeats=1", "--threads=1"]
    done = subprocess.run(
        [
            sys.executable, FOLDER / "bench_real.py", f"--data={transcripts}",
            f"--model={tiny_checkpoint}", "--max_length=256", *words,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("(required ") == 2
    assert "8 pairs of" in done.stdout


@pytest.mark.parametrize("script", RUNS)
def test_a_benchmark_writes_the_inputs_of_its_sides(script, transcripts, tmp_path):
    module = importlib.import_module(script.removesuffix(".py"))
    module.prepare(SimpleNamespace(data=transcripts, folder=tmp_path, steps=2, pairs=20))
    assert any(len(read_lines(file)) >= 16 for file in tmp_path.glob("*.jsonl"))


def test_the_pairs_for_trees_match_their_names(transcripts, tmp_path):
    options = SimpleNamespace(data=transcripts, folder=tmp_path, steps=3)
    assert bench_trees.prepare(options) == {"hh": 24, "talks": 24, "grouped": 24}
    prompts: dict[str, list[tuple[str, str]]] = {}
    for row in read_lines(tmp_path / "grouped.jsonl"):
        prompts.setdefault(row["prompt"], []).append((row["chosen"], row["rejected"]))
    assert len(prompts) == 3
    for answers in prompts.values():
        assert len(set(answers)) == 8 and len({a for pair in answers for a in pair}) == 5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for row in read_lines(tmp_path / "talks.jsonl"):
        prompt, *sides = (
            bench_trees.length(tokenizer, row[k]) for k in ("prompt", "chosen", "rejected")
        )
        assert 0.9 * 3 <= prompt / (sum(sides) / 2) <= 1.1 * 3


@pytest.mark.parametrize("script", RUNS)
def test_a_missing_file_is_refused_with_2(script, tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / script, f"--data={tmp_path / 'none'}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "no such file" in done.stderr


def test_verdicts_and_spreads():
    assert str(Figure("speed", 4.0, 4.0)) == "speed: 4 (required >= 4): reached"
    assert str(Figure("peak", 0.3, 0.28, at_least=False, unit="GB")).endswith("0.28): MISSED")
    assert spread([3, 1, 2.5]) == "1.00 / 2.50 / 3.00"
