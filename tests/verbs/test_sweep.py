"""`--sweep`: a grid over one reference store, each run in its folder, one report of all."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import yaml

from modern_llm.cli import VERBS, main
from modern_llm.config.errors import NotFiniteError
from modern_llm.verbs.stages import STAGES


def in_place_of_dpo(monkeypatch, run):
    """Call `run(settings)` in place of training each point of a sweep."""
    (dpo,) = (stage for stage in STAGES if stage.name == "dpo")
    stand_in = dataclasses.replace(dpo, run=run)
    monkeypatch.setitem(VERBS, "dpo", (dpo.settings, stand_in.verb))


@pytest.mark.slow
def test_every_value_runs_over_one_store_and_one_report_shows_all(
    run_file, tmp_path, capsys, caplog, monkeypatch
):
    words = ["--sweep", "dpo.beta=0.05,0.3", "--json"]
    assert main(["dpo", "--config", str(run_file()), *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    folders = [tmp_path / "out" / f"beta-{beta}" for beta in (0.05, 0.3)]
    assert [run["run"] for run in result["runs"]] == [str(folder) for folder in folders]
    for folder, beta in zip(folders, (0.05, 0.3), strict=True):
        assert yaml.safe_load((folder / "config.yaml").read_text())["dpo"]["beta"] == beta
        assert (folder / "a_final" / "config.json").is_file()
        assert (folder / "report.html").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "beta=0.05 training" in page and "beta=0.3 training" in page
    first, second = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in folders
    )
    assert first[0]["logps/chosen"] == second[0]["logps/chosen"]  # the same first step
    assert first[-1]["logps/chosen"] != second[-1]["logps/chosen"]
    labels = [row["label"] for row in result["ranking"]["rows"]]
    assert result["ranking"]["by"] == "accuracy" and sorted(labels) == ["beta=0.05", "beta=0.3"]
    # The same command resumes: finished runs are skipped.
    times = [(f / "outcome.json").stat().st_mtime_ns for f in folders]
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["dpo", "--config", str(run_file()), *words[:-1]]) == 0
    table = capsys.readouterr().out.splitlines()
    at = table.index("ranked by accuracy, the best first")
    assert max(map(len, table[at:])) <= 80
    found = [re.search(r"beta=\S+", line) for line in table[at:]]
    assert [match[0] for match in found if match] == labels
    assert [(f / "outcome.json").stat().st_mtime_ns for f in folders] == times


def test_two_options_make_a_grid(run_file, monkeypatch):
    seen = []
    in_place_of_dpo(monkeypatch, lambda s: seen.append(s) or s.train.output_dir)
    words = ["--sweep", "dpo.beta=0.1,0.2 train.learning_rate=1e-6,5e-6"]
    assert main(["dpo", "--config", str(run_file()), *words]) == 0
    found = [(s.dpo.beta, s.train.learning_rate, s.train.output_dir.name) for s in seen]
    assert found == [
        (b, float(r), f"beta-{b}_learning_rate-{r}") for b in (0.1, 0.2) for r in ("1e-6", "5e-6")
    ]


def test_a_run_that_diverges_does_not_end_the_others(run_file, monkeypatch, capsys):
    seen = []

    def run(settings):
        seen.append(settings.dpo.beta)
        if settings.dpo.beta == 0.2:
            raise NotFiniteError("step 3: not finite")
        return settings.train.output_dir

    in_place_of_dpo(monkeypatch, run)
    assert main(["dpo", "--config", str(run_file()), "--sweep", "dpo.beta=0.1,0.2,0.3"]) == 4
    assert seen == [0.1, 0.2, 0.3]
    assert "step 3: not finite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sweep", "parts"),
    [
        ("dpo.beta", ["is not SECTION.OPTION=VALUE"]),
        ("beta=1,2", ["is not SECTION.OPTION=VALUE"]),
        (" ", ["names no option"]),
        ("dpo.bta=1,2", ["dpo.bta is no option of this stage"]),
        ("dpo.beta=0.1,0.1", ["is there twice"]),
        ("train.output_dir=a,b", ["is set by the sweep itself"]),
        ("dpo.beta=-1,-2,0.1", ["dpo.beta=-1", "dpo.beta=-2"]),
        ("dpo.beta=high,low", ["dpo.beta=high", "dpo.beta=low"]),
    ],
)
def test_a_bad_sweep_is_one_line_before_anything_runs(run_file, tmp_path, sweep, parts, capsys):
    assert main(["dpo", "--config", str(run_file()), "--sweep", sweep]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()


def test_a_sweep_is_not_tried_dry(run_file, capsys):
    words = ["--sweep", "dpo.beta=1,2", "--dry-run"]
    assert main(["dpo", "--config", str(run_file()), *words]) == 2
    assert "exclude each other" in capsys.readouterr().err
