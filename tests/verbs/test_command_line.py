"""What a command line may say, and the one line that refuses anything else."""

from __future__ import annotations

import io

import pytest

import modern_llm
from modern_llm.cli import main
from modern_llm.config.errors import ConfigError
from modern_llm.verbs.command_line import LONG_FORMS
from modern_llm.verbs.settings import read_settings
from modern_llm.verbs.stage_settings import DpoSettings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dpo --train x", "--train x: train is a section; set its options one by one"),
        ("dpo --train", "--train: train is a section; set its options one by one"),
        ("dpo --train {", "--train: not a JSON object"),
        (
            "dpo --data run.yaml",
            "--data run.yaml: data is a section; a configuration file is --config",
        ),
        ("dpo --lora 8", "--lora 8: lora is a section"),
        ("dpo --data.sources [", "--data.sources: Missing end delimiter"),
        ("dpo --json=3", "--json: takes no value, got '3'; see modern-llm dpo --help"),
        ("dpo --train.batch_size", "--train.batch_size: expected one argument"),
        ("dpo pairs.jsonl", "has no use for the word 'pairs.jsonl'; data is named by --data"),
        ("dpo a.yaml b.yaml", "two configuration files (a.yaml and b.yaml): keep one"),
        ("dpo a.yaml --config b.yaml", "two configuration files (a.yaml and --config): keep one"),
        ("dpo --resume --train.resume never", "--resume and --train.resume set the same option"),
        ("completion", "the following arguments are required: SHELL"),
    ],
)
def test_a_word_in_the_wrong_place_is_named(line, message, capsys):
    assert main(line.split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("modern-llm: error: command line: ") and message in error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a verb is missing: one of demo, "),
        ("run.yaml", "a verb comes first, not 'run.yaml', as in: modern-llm dpo RUN.yaml"),
        ("reference", "reference needs a second word: one of reference fill, "),
        ("reference foo", "unknown verb 'reference foo'"),
        ("generate --model x", "standard input: holds no prompt"),
        ("generate --model x --prompts {empty}", "empty: holds no prompt"),
    ],
)
def test_what_is_missing_is_named_before_a_model_is_loaded(
    line, message, tmp_path, capsys, monkeypatch
):
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(line.format(empty=tmp_path / "empty").split()) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


@pytest.fixture
def run_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train:\n  run_name: a\n  output_dir: b\n  max_steps: 5\nsft_checkpoint: c\n")
    return str(file)


def read(*words: str) -> DpoSettings:
    return read_settings(DpoSettings, list(words), "dpo")


def test_a_configuration_file_alone_is_the_option_config(run_file):
    plain = read("--config", run_file, "--train.seed", "3")
    assert plain.train.seed == 3
    assert plain == read(run_file, "--train.seed", "3") == read("--train.seed", "3", run_file)


def test_hyphens_and_underscores_are_alike_in_every_name(run_file):
    words = ["--train.learning-rate", "0.5", "--no-data.append-end-token", "--dry-run", "--json"]
    settings = read(run_file, *words, "--sft-checkpoint", "a-b_c", "--dpo.max-length=7")
    assert settings.train.learning_rate == 0.5 and settings.dpo.max_length == 7
    assert settings.dry_run and settings.json_output and not settings.data.append_end_token
    assert settings.sft_checkpoint == "a-b_c"


def test_a_file_in_place_of_the_data_section_is_its_dataset_name(run_file):
    for words in (["--data", "x.jsonl"], ["--data=x.jsonl"]):
        assert read(run_file, *words, "--data.split", "s").data.dataset_name == "x.jsonl"
    assert read(run_file, "--data", '{"dataset_name": "x"}').data.dataset_name == "x"


@pytest.mark.parametrize(
    "word", ["prompt=question,chosen=best", '{"prompt": "question", "chosen": "best"}']
)
def test_names_of_columns_are_json_or_pairs_of_words(run_file, word, capsys):
    assert read(run_file, "--data.columns", word).data.columns == {
        "prompt": "question",
        "chosen": "best",
    }
    assert main(["dpo", run_file, "--data.columns", "prompt"]) == 2
    assert "--data.columns: write NAME=VALUE,NAME=VALUE or JSON" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["score --output o.jsonl --model m", "evaluate --model m"])
def test_a_wrong_name_of_a_column_is_one_line(verb, capsys):
    assert main([*verb.split(), "--data", "d.jsonl", "--columns", "promt=q"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("modern-llm: error: columns: no format reads a column 'promt'")


def test_the_long_twin_of_a_short_option_is_accepted_and_not_shown(run_file, capsys):
    settings = read(run_file, "--train.resume", "never", "--train.profile_steps", "2")
    assert settings.train.resume == "never" and settings.train.profile_steps == 2
    with pytest.raises(SystemExit, match="0"):
        main(["dpo", "--help", "all"])
    shown = capsys.readouterr().out
    for long, short in LONG_FORMS.items():
        assert f"--{long} " not in shown and f"  --{short}" in shown


def test_an_error_names_the_command_line_or_the_line_of_the_file(run_file):
    words = ["--train.max_steps", "x", "--train.tokens_per_micro_batch", "y"]
    with pytest.raises(ConfigError) as refusal:
        read(run_file, *words)
    integer = "Input should be a valid integer, unable to parse string as an integer"
    assert refusal.value.problems == [
        f"command line: train.tokens_per_micro_batch: {integer} or Input should be 'auto', got 'y'",
        f"command line: train.max_steps: {integer}, got 'x'",
    ]
    rule = "train: max_steps and epochs exclude each other: keep one"
    with pytest.raises(ConfigError) as refusal:
        read(run_file, "--train.epochs", "2")
    assert str(refusal.value) == f"{run_file}:1 and command line: {rule}"


def test_a_word_for_a_section_in_a_file_is_refused_beside_options_of_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {run_name: a, output_dir: b}\nsft_checkpoint: c\ndata: x.jsonl\n")
    with pytest.raises(ConfigError, match=f"{file}:3.*: data: Input should be a dictionary"):
        read(str(file), "--data.split", "train")


@pytest.mark.parametrize("words", [["--version"], ["version"], ["-V"]])
def test_the_version_is_shown(words, capsys):
    assert main(words) == 0
    assert capsys.readouterr().out == f"modern-llm {modern_llm.__version__}\n"
