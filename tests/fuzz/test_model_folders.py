"""A damaged model folder with every verb that reads one: a result or one error line, in time."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from modern_llm.cli import main
from tests.fuzz.test_run_folders import DAMAGES, begin, damage
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

FINAL = (
    "MANIFEST.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
CHECKPOINT = ("MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json")
VERBS = ("generate", "score", "export", "report")
SHORT = ("binary", "list", "deep", "fifo", "endless link")
SECONDS = 120.0  # waiting for a writer would never end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERN_LLM_CACHE", str(folder / "cache"))
        model = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
        begin(folder / "run", model, write_jsonl(folder / "pairs.jsonl", transcripts(12)))
        assert {path.name for path in (folder / "run/r_final").iterdir()} >= set(FINAL)
        yield folder / "run", write_jsonl(folder / "few.jsonl", transcripts(3))


def words(verb: str, run: Path, model: Path, pairs: Path, out: Path) -> list[str]:
    if verb == "report":
        return [verb, str(run), "--output", str(out / "page.html")]
    more = {
        "generate": ["--prompt", "Hi", "--max_new_tokens", "2"],
        "score": [
            "--data",
            str(pairs),
            "--output",
            str(out / "s.jsonl"),
            "--max_length",
            "64",
            "--force",
        ],  # fmt: skip
        "export": ["--output", str(out / "exported")],
    }
    return [verb, "--model", str(model), *more[verb]]


def try_verb(verb: str, name: str, place: str, file: str, finished, tmp_path: Path, capsys) -> None:
    source, pairs = finished
    for at, step in enumerate([None, *sorted(p.name for p in (source / "checkpoints").iterdir())]):
        if (step is None) != (place == "final"):
            continue
        run = shutil.copytree(source, tmp_path / f"{at}" / "run")
        model = run / "r_final" if step is None else run / "checkpoints" / step
        outside = {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        damage(model / file, name)
        began = time.monotonic()
        status = main(words(verb, run, model, pairs, tmp_path))
        assert time.monotonic() - began < SECONDS
        err = capsys.readouterr().err
        told = [line for line in err.splitlines() if line.startswith("modern-llm: error: ")]
        assert status in (0, 2, 3) and len(told) == (status != 0), (status, err)
        assert "Traceback" not in err and "\x1b[2J" not in err
        assert outside == {path: path.stat().st_mtime_ns for path in source.rglob("*")}
        if file == "model.safetensors" and place == "final" and verb != "report":
            assert status != 0


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("verb", VERBS)
def test_a_damaged_file_of_a_final_model(verb, name, finished, tmp_path, capsys):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        folder = tmp_path / file
        folder.mkdir()
        try_verb(verb, name, "final", file, finished, folder, capsys)


@pytest.mark.long
@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("place", "file"),
    [*(("final", file) for file in FINAL), *(("checkpoint", file) for file in CHECKPOINT)],
)
def test_every_damage_of_every_file(place, file, verb, name, finished, tmp_path, capsys):
    try_verb(verb, name, place, file, finished, tmp_path, capsys)
