"""Markup, code fences and foreign code in everything that a run shows, exports or copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from modern_llm.cli import main
from modern_llm.models.load import inspect_checkpoint, load_model
from modern_llm.report.card import block, code, model_card, words
from modern_llm.report.page import render, write_report
from modern_llm.report.runs import read_runs
from tests.helpers.text import make_checkpoint, make_tokenizer

NASTY = "</script><script>x</script><!--<script>`````\n---\nlicense: mit\n---\n# x\x1b[2J\u202e"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    config = {
        "train": {"run_name": NASTY},
        "sft_checkpoint": NASTY,
        "data": {"template": NASTY, "sources": [{"dataset_name": NASTY}]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 0.5}\n')
    sample = {"step": 1, "prompt": NASTY, "policy": NASTY}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    summary = {"data": [{"source": NASTY, "formats": [NASTY]}], "environment": {NASTY: NASTY}}
    summary["changed"] = [NASTY, "train.run_name"]
    summary["data"][0] |= {"rows": 3, "drops": {NASTY: 1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    warning = {"step": 1, "text": NASTY, "advice": NASTY}
    (folder / "warnings.jsonl").write_text(json.dumps(warning) + "\n")
    outcome = {"status": 4, "reason": NASTY, "last_step": 2}
    (folder / "outcome.json").write_text(json.dumps(outcome))
    return folder


def test_a_page_holds_no_markup_or_control_of_a_run(run, tmp_path):
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == render(read_runs([run]), []).count("<script") == 2
    assert "<!--<" not in page and "\x1b" not in page and "\u202e" not in page
    points = page.split('id="points">')[1].split("</script>")[0]
    assert "<" not in points and json.loads(points)
    assert page.count("license: mit") >= 9  # each of these texts is shown


def test_a_page_of_two_runs_holds_no_markup_or_control_of_them(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["dpo"] = {"loss_type": NASTY}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    write_report([run, other], tmp_path / "page.html", refresh=10)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == 2 and "ranked by" in page
    assert "<!--<" not in page and "\x1b" not in page and "\u202e" not in page
    points = json.loads(page.split('id="points">')[1].split("</script>")[0])
    names = " ".join(line["name"] for panel in points.values() for line in panel["series"])
    assert "loss_type" in names and "\x1b" not in names and "\u202e" not in names


def test_a_card_holds_no_markup_or_front_matter_of_a_run(run):
    from huggingface_hub import ModelCard

    text = model_card(run)
    card = ModelCard(text)
    assert getattr(card.data, "license", None) is None
    assert "\x1b" not in text and "\u202e" not in text
    outside = card.text.split("``````")  # the configuration has five backticks in a row
    assert "\n---\n" not in outside[0] and "<script>" not in outside[0].replace("\\<", "")


def test_fences_are_longer_than_runs_in_their_content():
    assert code("a``b") == "```a``b```" and code("`a") == "`` `a ``"
    assert block(["````"], "yaml") == ["`````yaml", "````", "`````"]
    assert words("[a](b)\n# c") == "\\[a\\](b) \\# c"


def test_attention_kernels_named_in_a_configuration_are_not_used(tmp_path, monkeypatch):
    model = make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    path = model / "config.json"
    content = json.loads(path.read_text())
    names = {"attn_implementation", "_attn_implementation", "experts_implementation"}
    path.write_text(json.dumps(content | dict.fromkeys(names, "someone/kernel")))
    loaded = load_model(inspect_checkpoint(model))
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["ds_configs", "accelerate_configs/ddp.yaml"])
def test_presets_are_not_copied_through_a_link(name, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = tmp_path / "copy" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere if "." not in name else elsewhere / "file")
    assert main(["presets", "--copy", str(tmp_path / "copy")]) == 2
    assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())
