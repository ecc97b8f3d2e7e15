"""Losses and formats of a user: registered, used by a run, refused where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml

import modern_llm
from modern_llm.cli import main
from modern_llm.config.dpo import DPOConfig
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.models.load import load_tokenizer
from modern_llm.objectives import catalogue
from modern_llm.objectives.losses import FUNCTIONS
from modern_llm.objectives.preference import preference_loss

PLUGIN = """
import modern_llm
from torch.nn.functional import logsigmoid

def cautious(policy, reference, *, beta):
    r = policy - reference
    return -logsigmoid(beta * (r[:, 0] - r[:, 1]) - 0.5)

def talk(row):
    if row["q"] == "skip":
        return None
    return {"prompt": row["q"], "chosen": row["good"], "rejected": row["bad"]}

modern_llm.register_loss("cautious", cautious)
modern_llm.register_format("talk", talk, columns=["q", "good", "bad"])
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """Forget what a test registered."""
    from modern_llm.config import plugins
    from modern_llm.data.read import formats

    losses, functions = dict(catalogue._ALL), dict(FUNCTIONS)
    names = list(PreferenceDatasetConfig.formats)
    monkeypatch.setattr(plugins, "_loaded", [])
    yield
    for table, before in ((catalogue._ALL, losses), (FUNCTIONS, functions)):
        table.clear()
        table.update(before)
    PreferenceDatasetConfig.formats[:] = names
    formats.OWN_PREFERENCES.clear()


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A module `mine.losses` in the current folder, and rows that only it reads."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "losses.py").write_text(PLUGIN)
    rows = [{"q": f"q {n}?", "good": f" yes {n}", "bad": f" no {n}"} for n in range(9)]
    rows[4]["q"] = "skip"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return load_tokenizer(str(tiny_tokenizer))


def words(checkpoint, *more):
    fixed = ["--sft_checkpoint", str(checkpoint), "--train.run_name", "r", "--train.max_steps", "2"]
    fixed += ["--train.output_dir", "run", "--train.batch_size", "4", "--dpo.max_length", "64"]
    return ["dpo", *fixed, "--data", "rows.jsonl", "--data.max_dropped", "0.5", *more]


@pytest.mark.slow
def test_a_run_with_a_plugin_names_it_and_runs_again(plugin, tiny_checkpoint, capsys):
    more = ["--plugins", "mine.losses", "--dpo.loss_type", "cautious,sft"]
    assert main(words(tiny_checkpoint, *more)) == 0
    record = yaml.safe_load((plugin / "run" / "config.yaml").read_text())
    assert record["plugins"] == ["mine.losses"]
    lines = (plugin / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    expected = torch.nn.functional.softplus(torch.tensor(0.5)).item()  # -log s(-0.5), ratios of 0
    assert metrics[0]["loss/cautious"] == pytest.approx(expected, rel=1e-5)
    dropped = (plugin / "run" / "data" / "dropped_rows.jsonl").read_text()
    assert "rows.jsonl:5" in dropped and "left out by format talk" in dropped
    capsys.readouterr()
    # A process that has registered nothing reads the file.
    script = "import sys; from modern_llm.cli import main; sys.exit(main(sys.argv[1:]))"
    again = [sys.executable, "-c", script, "dpo", "--config", "run/config.yaml"]
    done = subprocess.run(again, capture_output=True, text=True, cwd=plugin)
    assert done.returncode == 0 and "already finished" in done.stderr


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        ("import modern_llm as m; m.register_loss('sigmoid', max)", "a loss of this package"),
        ("import modern_llm as m; m.register_loss('x', lambda a: a)", "must be callable as"),
    ],
)
def test_a_plugin_that_fails_is_one_line_and_status_2(plugin, text, fragment, capsys):
    (plugin / "mine" / "losses.py").write_text(text)
    assert main(words("no/such/model", "--plugins", "mine.losses")) == 2
    err = capsys.readouterr().err
    assert err.startswith("modern-llm: error: plugins: mine.losses cannot be imported")
    assert fragment in err and err.count("\n") == 1
    assert not (plugin / "run").exists()


def test_a_word_that_is_no_module_is_refused(plugin, capsys):
    assert main(words("no/such/model", "--plugins", "mine/losses.py")) == 2
    assert "'mine/losses.py' is no module's name" in capsys.readouterr().err


def test_a_registered_loss_is_like_those_of_the_catalogue():
    def mine(policy, lengths, *, beta):
        return -policy[:, 0] / lengths[:, 0]

    modern_llm.register_loss("mine", mine, reference=False, lengths=True)
    policy, lengths = torch.tensor([[-3.0, -1.0], [-8.0, -2.0]]), torch.tensor([[3, 1], [2, 2]])
    assert preference_loss(policy, None, lengths, loss_type="mine").tolist() == [1.0, 4.0]
    config = DPOConfig(loss_type="mine")
    assert not config.needs_reference
    with pytest.raises(ValueError, match="reads no reference"):
        DPOConfig(loss_type="mine", reference="store")
    modern_llm.register_loss("mine", lambda policy, *, beta: policy.mean(), reference=False)
    with pytest.raises(ValueError, match="return one loss a pair"):
        preference_loss(policy, None, lengths, loss_type="mine")
    with pytest.raises(ValueError, match="letters, digits"):
        modern_llm.register_loss("my loss", mine)


def test_a_format_that_fails_names_the_row(tmp_path, tokenizer):
    from modern_llm.config.errors import DataError
    from modern_llm.data.table.build import prepare_tables

    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "x": [" y", " n"]}\n{"q": "b", "x": []}\n')
    section = PreferenceDatasetConfig(dataset_name=str(path))

    def read(row):
        return {"prompt": row["q"], "chosen": row["x"][0], "rejected": row["x"][1]}

    modern_llm.register_format("mine", read, columns=["q", "x"])
    with pytest.raises(DataError, match=r"rows.jsonl:2: format 'mine': IndexError"):
        prepare_tables(section, tokenizer, tmp_path / "t", max_length=32)
    modern_llm.register_format("mine", lambda row: [1], columns=["q", "x"])
    with pytest.raises(DataError, match="returned list, expected a dict or None"):
        prepare_tables(section, tokenizer, tmp_path / "u", max_length=32)
    assert PreferenceDatasetConfig(format="mine").format == "mine"
    with pytest.raises(ValueError, match="is none of 'auto', 'hh'"):
        PreferenceDatasetConfig(format="yours")
    with pytest.raises(ValueError, match="a format of this package"):
        modern_llm.register_format("hh", read, columns=["q"])
    with pytest.raises(ValueError, match="kind 'documents'"):
        modern_llm.register_format("mine", read, columns=["q"], kind="documents")


def test_tables_of_an_earlier_function_are_not_reused(tmp_path, tokenizer):
    from modern_llm.data.table.build import prepare_tables

    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "x": [" y", " n"]}\n')
    section = PreferenceDatasetConfig(dataset_name=str(path))
    digests = set()
    for first in (0, 1):
        text = (
            f"lambda r: dict(prompt=r['q'], chosen=r['x'][{first}], rejected=r['x'][1 - {first}])"
        )
        modern_llm.register_format("mine", eval(text), columns=["q", "x"])
        tables = prepare_tables(section, tokenizer, tmp_path / "t", max_length=32)
        digests.add(tables.train.digest)
    assert len(digests) == 2
