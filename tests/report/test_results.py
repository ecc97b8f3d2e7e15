"""Results on the page: last and best values of a run, and the ranking of several."""

from __future__ import annotations

import json
import re

import pytest

from modern_llm.report.page import write_report
from tests.report.test_page import table


def test_results_have_last_and_best_values_with_the_step(make_run):
    folder = make_run()
    write_report([folder], folder / "report.html")
    head, *rows = table((folder / "report.html").read_text(), "Results")
    assert head == ["Metric", "Last", "Best", "at step"]
    found = {row[0]: row[1:] for row in rows}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min(records, key=lambda r: r["loss"])
    assert found["loss"] == [
        f"{records[-1]['loss']:.4f}", f"{best['loss']:.4f}", str(best["step"])
    ]  # fmt: skip
    assert found["accuracy"] == ["75.0%", "75.0%", "50"]
    assert found["time"] == ["45.0 s", "", ""] and found["memory, GB"] == ["31.20", "", ""]


def test_runs_are_ranked_by_their_evaluation(make_run, tmp_path):
    folders = [
        make_run(name, steps=50, beta=beta)
        for name, beta in zip("abc", (0.1, 0.2, 0.3), strict=True)
    ]
    for folder, accuracy in zip(folders, (0.6, 0.9, 0.7), strict=True):
        with (folder / "metrics.jsonl").open("a") as file:
            for step, value in ((51, 0.95), (52, accuracy)):
                record = {"step": step, "eval/rewards/accuracies": value}
                file.write(json.dumps(record) + "\n")
    (folders[2] / "outcome.json").unlink()
    write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    head, *rows = table(text, "Runs")
    assert head[:3] == ["Run", "evaluation accuracy", "best, at step"]
    assert [row[:3] for row in rows] == [
        ["beta=0.2", "90.0%", "95.0% at 51"],
        ["beta=0.3", "70.0%", "95.0% at 51"],
        ["beta=0.1", "60.0%", "95.0% at 51"],
    ]
    assert [row[-1] for row in rows] == ["finished, step 50", "no outcome yet", "finished, step 50"]
    # A run has one colour in its row and in all panels.
    (colour,) = set(re.findall(r'background: var\(--run(\d+)\)"></span>beta=0.3', text))
    points = json.loads(re.search(r'id="points">(.*?)</script>', text, re.S)[1])
    series = [line for panel in points.values() for line in panel["series"]]
    assert {line["colour"] for line in series if "beta=0.3" in line["name"]} == {int(colour)}


@pytest.mark.parametrize(
    ("metric", "title", "first"),
    [
        ("eval/loss", "evaluation loss", "beta=0.1"),
        ("eval/logps/chosen", "eval/logps/chosen", "beta=0.2"),
        ("eval/x", "evaluation accuracy", "beta=0.2"),
    ],
)
def test_a_named_best_metric_ranks_the_runs(make_run, tmp_path, metric, title, first):
    folders = []
    for name, beta, value in (("a", 0.1, 0.1), ("b", 0.2, 0.2)):
        folders.append(make_run(name, steps=9, beta=beta, best_metric=metric))
        record = {f"eval/{n}": value for n in ("loss", "logps/chosen", "rewards/accuracies")}
        with (folders[-1] / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 10} | record) + "\n")
    write_report(folders, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert f"ranked by {title}</h2>" in text
    assert table(text, "Runs")[1][0] == first


def test_without_an_evaluation_the_loss_ranks_and_runs_without_it_are_last(make_run, tmp_path):
    folders = [make_run(name, steps=5, beta=beta) for name, beta in (("a", 0.1), ("b", 0.2))]
    for folder, loss in zip(folders, (None, 0.5), strict=True):
        lines = [{"step": 1, "lr": 1.0}, {"step": 2} | ({"loss": loss} if loss else {"lr": 2.0})]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    write_report(folders, tmp_path / "report.html")
    head, *rows = table((tmp_path / "report.html").read_text(), "Runs")
    assert head[:2] == ["Run", "loss"]
    assert [row[:2] for row in rows] == [["beta=0.2", "0.5000"], ["beta=0.1", "—"]]
