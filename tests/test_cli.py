"""The command line: help at once, every error one line with rule, value, place, cure; status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modern_llm.cli import VERBS, main
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    make_checkpoint(folder / "other", folder / "tokenizer", seed=5)
    write_jsonl(folder / "pairs.jsonl", transcripts(12))
    return folder


def shell(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "modern_llm", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


HELP_OF_ALL = """
import contextlib, io, json, sys
from modern_llm.cli import VERBS, main

for verb in VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = main([*verb.split(), "--help"])
        except SystemExit as end:
            status = end.code
    heavy = sorted({"torch", "transformers", "accelerate", "datasets"} & set(sys.modules))
    print(json.dumps([verb, status, heavy, out.getvalue()]))
"""


@pytest.fixture(scope="module")
def helps():
    """(status, heavy modules, text) of each verb's help; one process, as a start takes a second."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return {verb: rest for verb, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("verb", VERBS)
def test_help_imports_nothing_heavy_and_explains(verb, helps):
    status, heavy, text = helps[verb]
    assert not status and not heavy
    assert f"modern-llm {verb}" in text
    assert len(text.splitlines()) > 8


@pytest.mark.parametrize(("given", "seen"), [(None, "passive"), ("active", "active")])
def test_threads_do_not_spin_unless_the_user_says_so(given, seen):
    code = (
        "import os, sys; from modern_llm import cli; sys.argv[1:] = ['version']\n"
        "try: cli.run()\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules  # it reads the variable when it is imported\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.stdout.splitlines()[-1] == seen, done.stderr


def test_help_takes_under_a_second_of_processor_time():
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shell("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_the_overview_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["dop"], ["unknown verb 'dop'", "did you mean dpo?"]),
        (["dpo", "--train.lerning_rate", "1"], ["--train.lerning_rate", "--train.learning_rate"]),
        (["dpo", "--config", "nowhere.yaml"], ["nowhere.yaml", "No such file"]),
        (["generate", "--model", "no/such", "--prompt", "x"], ["no/such", "check the path"]),
        (["generate", "--model", "x", "--temperature", "-1"], ["temperature", "-1"]),
        (["generate", "--model", "x", "--prompt", "y", "--seed", "1"], ["seed has no effect"]),
        (["generate", "--model", "x", "--prompt", "y", "--template", "z{"], ["neither `chat`"]),
        (
            ["score", "--model", "x", "--data", "y", "--output", "z", "--mixed_precision", "bf17"],
            ["mixed_precision", "'bf17'"],
        ),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words, parts, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("modern-llm: error: ")
    assert len(err.strip().splitlines()) == 1
    for part in parts:
        assert part in err


def test_all_configuration_errors_come_at_once_with_their_lines(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "train:\n  run_name: x\n  lerning_rate: 3\n  batch_size: -1\n"
        f"  output_dir: {tmp_path / 'out'}\n"
        "dpo:\n  loss_type: sigmoidd\n  beta: -1\nmodle: 3\n"
    )
    assert main(["dpo", "--config", str(file), "--train.max_steps", "many"]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    for part in (
        f"{file}:3: train.lerning_rate: unknown option (did you mean learning_rate?)",
        f"{file}:4: train.batch_size: Input should be greater than 0, got -1",
        "train.max_steps: Input should be a valid integer",
        "sft_checkpoint: required",
        "did you mean 'sigmoid'?",
        "beta=-1",
        f"{file}:9: modle: unknown option",
    ):
        assert part in err, part
    assert not (tmp_path / "out").exists()


def test_a_section_that_stands_twice_is_named_alone(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  batch_size: 1\n  max_steps: 2\n" * 2)
    assert main(["sft", "--config", str(file)]) == 2
    line = f"modern-llm: error: {file}:4: train is there twice; keep one\n"
    assert capsys.readouterr().err == line


def test_of_many_problems_ten_are_named(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n" + "".join(f"  wrong_{i}: 1\n" for i in range(30)))
    assert main(["sft", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert err.count(f"{file}:") == 10 and err.endswith("more\n")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: [", "not YAML"),
        ("- 1\n", "must be a mapping"),
        ("train: {a: 1}\ntrain: {b: 2}\n", "is there twice"),
        ("train: {a: 1, null: 2}\n", ":1: train.null: a name is text"),
        ("train:\n  3: 2\n", ":2: train.3: a name is text"),
        ("data:\n  sources:\n  - a: 1\n  - -1: 2\n", ":4: data.sources.1.-1: a name is text"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, text, part, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["sft", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:" in err and part in err


def test_files_are_overridden_by_the_command_line(place, tmp_path, capsys):
    file = tmp_path / "run.json"
    file.write_text(
        json.dumps(
            {
                "sft_checkpoint": str(place / "model"),
                "train": {
                    "run_name": "a", "output_dir": str(tmp_path / "x"), "batch_size": 4,
                    "max_steps": 50, "log_every": 1,
                },
                "dpo": {"max_length": 96},
                "data": {"dataset_name": str(place / "pairs.jsonl")},
            }
        )
    )  # fmt: skip
    words = ["--train.max_steps", "2", "--train.output_dir", str(tmp_path / "y"), "--json"]
    assert main(["dpo", "--config", str(file), *words]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1]) == {"final": str(tmp_path / "y" / "a_final")}
    assert [line.split()[0] for line in out[:-1]] == ["step=1", "step=2"]
    # What was written is what ran, and runs again from the file alone.
    assert main(["dpo", "--config", str(tmp_path / "y" / "config.yaml")]) == 0


def test_score_writes_the_models_own_logprobs(place, tmp_path, capsys):
    output = tmp_path / "scores.jsonl"
    words = ["--model", str(place / "model"), "--reference", str(place / "other")]
    words += ["--data", str(place / "pairs.jsonl"), "--output", str(output), "--max_length", "256"]
    assert main(["score", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pairs"] == 12
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["origin"] for row in rows] == [f"{place / 'pairs.jsonl'}:{n}" for n in range(1, 13)]
    output.write_text("mine")
    assert main(["score", *words]) == 2
    assert "scores.jsonl: exists; name another, or add --force" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["score", *words, "--force"]) == 0
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    models = {
        "policy": AutoModelForCausalLM.from_pretrained(place / "model"),
        "reference": AutoModelForCausalLM.from_pretrained(place / "other"),
    }
    for row, pair in zip(rows, transcripts(12), strict=True):
        for side in ("chosen", "rejected"):
            head, _, answer = pair[side].rpartition("\n\nAssistant:")
            prompt = tokenizer(head + "\n\nAssistant:")["input_ids"]
            response = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
            assert row[f"{side}_tokens"] == len(response)
            ids = torch.tensor([prompt + response])
            for name, model in models.items():
                with torch.no_grad():
                    logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
                expected = logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
                assert row[f"{name}_{side}"] == pytest.approx(float(expected), abs=1e-3)


def test_generate_answers_as_transformers_does(place, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = ["the red river", "a"]
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    file = place / "prompts.txt"
    file.write_text("\n".join(prompts))
    words = ["--model", str(place / "model"), "--prompts", str(file), "--max_new_tokens", "6"]
    assert main(["generate", *words, "--json"]) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [a["answer"] for a in answers] == expected
    assert [a["prompt"] for a in answers] == prompts


def test_a_yaml_no_is_the_word_no(tmp_path):
    from modern_llm.verbs.settings import read_settings
    from modern_llm.verbs.stage_settings import PretrainSettings

    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {vocab_size: 10}\n"
        f"train: {{run_name: a, output_dir: {tmp_path}, mixed_precision: no}}\n"
    )
    settings = read_settings(
        PretrainSettings, ["--config", str(file), "--train.max_grad_norm", "null"], "pretrain"
    )
    assert settings.train.mixed_precision == "no"
    assert settings.train.max_grad_norm is None


def test_a_place_that_cannot_be_written_is_one_line_and_status_3(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output_dir", str(tmp_path / "file" / "demo")]) == 3
    assert capsys.readouterr().err.startswith("modern-llm: error: ")


@pytest.mark.slow
def test_a_data_error_names_file_and_line_and_leaves_nothing(place, tmp_path):
    broken = tmp_path / "broken.jsonl"
    lines = (place / "pairs.jsonl").read_text().splitlines()
    broken.write_text("\n".join([*lines[:5], lines[5][:-3], *lines[6:]]))
    done = shell(
        "dpo", "--sft_checkpoint", str(place / "model"), "--data.dataset_name", str(broken),
        "--train.run_name", "x", "--train.output_dir", str(tmp_path / "out"),
        "--dpo.max_length", "96", "--train.batch_size", "4",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if "error" in text]
    assert line.startswith(f"modern-llm: error: {broken}:6")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_word_that_is_a_whole_file_is_cut_and_the_rest_of_the_line_stands(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"chosen": "x" * 20000, "rejected": 3}) + "\n")
    assert main(["inspect", "--data", str(pairs), "--format", "y" * 20000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("modern-llm: error: ")
    assert "yyy..." in line and len(line) < 1500
