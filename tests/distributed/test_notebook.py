"""Output in notebooks, with a stand-in for IPython; `tests/test_notebook.py` runs a real kernel."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

import modern_llm as ml
from modern_llm.config.errors import DataError, StorageError, UserError
from modern_llm.distributed import notebook
from modern_llm.distributed.progress_bar import ProgressBar


class Cell:
    """What a cell shows: each output once, in its newest state."""

    def __init__(self):
        self.outputs: list[dict[str, str]] = []

    def display(self, data: dict[str, str], *, raw: bool, display_id: bool = False):
        assert raw
        at = len(self.outputs)
        self.outputs.append(data)

        def update(data, *, raw):
            self.outputs[at] = data

        return SimpleNamespace(update=update) if display_id else None


def use(monkeypatch, shell: object) -> Cell:
    cell = Cell()
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: shell
    ipython.display = display
    ipython.version_info = (9, 0)  # matplotlib reads it
    display.display = cell.display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return cell


@pytest.fixture
def cell(monkeypatch) -> Cell:
    return use(monkeypatch, SimpleNamespace(kernel=object()))


@pytest.fixture
def no_ipython(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)


def test_a_bar_is_one_output_with_steps_time_left_and_metrics(cell, capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(notebook.time, "monotonic", lambda: float(next(clock)))
    with ProgressBar("<b>", 100, 20, shown=True) as display:
        display.advance(40)
        display.status("loss 0.5")
        display.line("step=40 loss=0.5")
    (output,) = cell.outputs
    assert "40/100" in output["text/plain"] and "loss 0.5" in output["text/plain"]
    assert "s left" in output["text/plain"]
    assert '<progress value="40" max="100">' in output["text/html"]
    assert "&lt;b&gt;" in output["text/html"] and "<b>" not in output["text/html"]
    assert capsys.readouterr().out == "step=40 loss=0.5\n"


def test_a_bar_is_drawn_a_few_times_a_second_and_at_its_end(cell, monkeypatch):
    monkeypatch.setattr(notebook.time, "monotonic", lambda: 5.0)
    drawn = []
    with ProgressBar("x", 1000, 0, shown=True) as display:
        monkeypatch.setattr(notebook.CellBar, "_content", lambda self: drawn.append(1) or [{}])
        for step in range(1000):
            display.advance(step)
    assert len(drawn) == 2


def test_other_ranks_and_terminals_show_nothing_in_a_cell(monkeypatch, cell):
    with ProgressBar("x", 10, 0, shown=False) as display:
        display.advance(3)
    assert cell.outputs == []
    terminal = use(monkeypatch, SimpleNamespace(kernel=None))
    assert not notebook.in_notebook()
    with ProgressBar("x", 10, 0, shown=True):
        notebook.show("a", "a")
    assert terminal.outputs == []


def test_a_link_is_relative_below_the_notebook_and_a_path_elsewhere(cell, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    notebook.show_link(Path("runs/a <b>/report.html"), "report")
    notebook.show_link(tmp_path / "report.html", "report")
    near, far = cell.outputs
    assert 'href="runs/a%20%3Cb%3E/report.html"' in near["text/html"]
    assert "runs/a &lt;b&gt;/report.html</a>" in near["text/html"]
    assert "href" not in far["text/html"] and str(tmp_path) in far["text/html"]


@pytest.mark.parametrize("kind", [UserError, DataError, StorageError])
def test_an_error_of_a_user_is_one_line_in_ipython(cell, kind):
    with pytest.raises(kind) as caught, notebook.one_line_errors():
        raise kind("pairs.jsonl:3: no\ncolumn\x1b[2J")
    (line,) = caught.value._render_traceback_()
    assert line == f"{kind.__name__}: pairs.jsonl:3: no column\\x1b[2J"
    assert not hasattr(kind, "_render_traceback_")


def test_a_bug_keeps_its_traceback(cell):
    with pytest.raises(KeyError) as caught, notebook.one_line_errors():
        raise KeyError("x")
    assert not hasattr(caught.value, "_render_traceback_")


def test_without_ipython_an_error_is_unchanged(no_ipython):
    with pytest.raises(UserError) as caught, notebook.one_line_errors():
        raise UserError("x")
    assert not hasattr(caught.value, "_render_traceback_")
    assert notebook.shell() is None and not notebook.in_notebook()


def test_the_stages_mark_their_errors(cell, tmp_path):
    for stage in (ml.dpo, ml.sft):
        with pytest.raises(UserError) as caught:
            stage("nowhere", str(tmp_path / "no.jsonl"), output_dir=tmp_path / "x")
        assert len(caught.value._render_traceback_()) == 1


def test_a_run_shows_its_bar_data_dropped_rows_and_report(
    cell, tmp_path, monkeypatch, tiny_checkpoint, tiny_pairs
):
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in Path(tiny_pairs).read_text().splitlines()]
    rows += [{**rows[0], "rejected": rows[0]["chosen"]}] * 2
    options = {"output_dir": "r", "batch_size": 4, "max_steps": 2, "max_dropped": 0.9}
    ml.dpo(str(tiny_checkpoint), rows, max_length=96, **options)
    texts = [output["text/plain"] for output in cell.outputs]
    assert any(text.startswith("dpo 2/2") for text in texts)
    (data,) = (output for output in cell.outputs if "data: " in output["text/plain"])
    assert f"{len(rows)} rows, {len(rows) - 2} kept" in data["text/plain"]
    assert f"dropped: 2 of {len(rows)} rows" in data["text/plain"]
    assert "<table>" in data["text/html"] and "dropped_rows.jsonl" in data["text/html"]
    assert texts[-1] == "report: r/report.html"
    cell.outputs.clear()
    ml.dpo(str(tiny_checkpoint), rows, max_length=96, **options)
    first, second = (output["text/plain"] for output in cell.outputs)
    assert "dpo is already finished; remove r to train again" in first
    assert second == "report: r/report.html"
