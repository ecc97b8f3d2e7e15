"""The verb `inspect`: from the shell's words, or from the configuration of a run."""

from __future__ import annotations

import io
import json

import pytest
import yaml
from rich.console import Console
from transformers import AutoTokenizer

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig
from modern_llm.data.table.build import prepare_tables
from modern_llm.verbs.terminal import LINES_OF_EXAMPLE, _example
from tests.helpers.text import make_tokenizer, transcripts, write_jsonl


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    make_tokenizer(folder / "tokenizer")
    write_jsonl(folder / "pairs.jsonl", transcripts(60))
    return folder


def words(place) -> list[str]:
    return ["--data", str(place / "pairs.jsonl"), "--tokenizer", str(place / "tokenizer")]


def test_json_is_the_last_line_and_only_that_is_shown(place, capsys):
    assert main(["inspect", *words(place), "--json", "--max_length", "96"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert {"rows", "kept", "dropped", "formats", "sources", "warnings"} <= set(result)
    assert (result["rows"], result["max_length"], len(result["examples"])) == (60, 96, 3)


def test_a_person_sees_tables_histograms_and_coloured_examples(place, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["inspect", *words(place), "--max_length", "40"]) == 0
    out = capsys.readouterr().out
    for part in ("format hh: its rows have chosen, rejected", "60 rows", "█", "warning: ", "[dpo."):
        assert part in out.replace("\x1b[1m", "").replace("\x1b[0m", ""), part
    assert "\x1b[4;32m" in out and "\x1b[36m" in out  # targets underlined in green; the prompt cyan


def test_a_long_example_shows_its_beginning_and_its_end():
    tokens = [f"word{at} " for at in range(200)]
    example = {"origin": "a.jsonl:1", "columns": [
        {"column": "prompt", "tokens": ["short\n", "text"], "target": [False, False]},
        {"column": "chosen", "tokens": tokens, "target": [True] * 200},
    ]}  # fmt: skip
    for width in (60, 80):
        shown = io.StringIO()
        Console(file=shown, width=width).print(_example(example, width))
        lines = shown.getvalue().splitlines()
        assert len(lines) == 2 + 3 + 1 + LINES_OF_EXAMPLE + 1
        assert max(map(len, lines)) <= width
        for part in ("chosen: 200 tokens, 200 targets", "word0 ", "word199", " lines more ..."):
            assert part in shown.getvalue(), part
        assert "word100 " not in shown.getvalue()


def test_the_configuration_of_a_run_says_data_tokenizer_and_lengths(place, tmp_path, capsys):
    run = {
        "sft_checkpoint": str(place / "tokenizer"),
        "train": {"run_name": "a", "output_dir": str(tmp_path / "out"), "batch_size": 7},
        "dpo": {"max_length": 64},
        "data": {"dataset_name": str(place / "pairs.jsonl"), "eval_fraction": 0.2},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    assert main(["inspect", "--config", str(file), "--json", "--examples", "0"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["max_length"], result["batch_size"], result["examples"]) == (64, 7, [])
    assert result["leakage"]["evaluation_rows"] > 0
    assert not (tmp_path / "out").exists()
    assert main(["inspect", "--config", str(file), "--json", "--max_length", "80"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["max_length"] == 80


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--tokenizer", "no/such"], "tokenizer no/such"),
        (["--template", "x"], "neither `chat`"),
        (["--kind", "documents", "--template", "chat"], "template has no effect on documents"),
        (["--max_length", "8", "--max_prompt_length", "8"], "leaves no token"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--eval_fraction", "0.2", "--eval_data", "x.jsonl"], "exclude each other"),
        (["--examples", "50"], "less than or equal to 20"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(place, more, part, capsys):
    assert main(["inspect", *words(place), *more]) == 2
    err = capsys.readouterr().err
    assert part in err and len(err.strip().splitlines()) == 1


def test_nothing_named_is_said(capsys):
    assert main(["inspect"]) == 2
    assert "give --data FILE, or --config" in capsys.readouterr().err


def test_a_configuration_of_no_stage_is_refused(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    file.write_text("train: {run_name: a, output_dir: b}\n")
    assert main(["inspect", "--config", str(file)]) == 2
    assert "the stage shows by one of" in capsys.readouterr().err


def test_tokens_are_those_that_training_gets(place, tmp_path, capsys):
    out = tmp_path / "tokens.jsonl"
    assert main(["inspect", *words(place), "--max_length", "40", "--tokens", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(place / "tokenizer")
    config = PreferenceDatasetConfig(dataset_name=str(place / "pairs.jsonl"))
    table = prepare_tables(config, tokenizer, tmp_path / "t", max_length=40).train
    assert len(lines) == len(table) == 60
    for index, line in enumerate(lines):
        assert line["origin"] == table.origin(index)
        for column in table.columns:
            assert line[f"{column}_ids"] == table.ids(index, column).tolist()
    assert {name for line in lines for name in line} == {
        "origin", "prompt_ids", "chosen_ids", "rejected_ids"
    }  # fmt: skip


def test_tokens_of_a_response_without_a_prompt_are_masked(place, tmp_path, capsys):
    rows = [{"prompt": "", "response": "Boats came in."}, {"prompt": "a", "response": "b"}]
    write_jsonl(tmp_path / "sft.jsonl", rows)
    out = tmp_path / "tokens.jsonl"
    more = ["--data", str(tmp_path / "sft.jsonl"), "--kind", "instructions", "--tokens", str(out)]
    assert main(["inspect", *words(place)[2:], *more]) == 0
    first, second = (json.loads(line) for line in out.read_text().splitlines())
    assert first["prompt_ids"] == [] and "response_targets" not in second
    assert first["response_targets"] == [0] + [1] * (len(first["response_ids"]) - 1)


def test_a_failed_look_leaves_no_token_file(place, tmp_path, capsys):
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "c"}])
    more = ["--data", str(tmp_path / "bad.jsonl"), "--tokens", str(tmp_path / "out.jsonl")]
    assert main(["inspect", *words(place)[2:], *more]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
    assert main(["inspect", *words(place), "--tokens", str(tmp_path / "no" / "x.jsonl")]) == 2
    assert "is no folder" in capsys.readouterr().err
