"""Runs and errors in the cells of a real notebook kernel."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.slow

TRAIN = """
import json, os, threading
from pathlib import Path
import modern_llm as ml
rows = [json.loads(line) for line in Path({pairs!r}).read_text().splitlines()]
rows += [{{**rows[0], "rejected": rows[0]["chosen"]}}]
options = dict(batch_size=4, max_steps=2, max_length=96, max_dropped=0.9)
ml.dpo({model!r}, rows, output_dir="run", **options)
"""
WRONG = """
Path("wrong.jsonl").write_text('{{"prompt": "a", "chosen": "b"')
ml.dpo({model!r}, "wrong.jsonl", output_dir="wrong", **options)
"""


def run_cells(*sources: str, folder) -> list[list[dict]]:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra: test)")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra: test)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra: test)")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(folder)}}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / "jupyter"))
        client = nbclient.NotebookClient(notebook, timeout=120, allow_errors=True, resources=where)
        client.execute()
    return [cell.outputs for cell in notebook.cells]


def shown(outputs: list[dict]) -> str:
    return "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/html", "") for output in outputs
    )


def test_cells_show_a_run_and_its_errors(tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    names = {"pairs": str(tiny_pairs), "model": str(tiny_checkpoint)}
    trained, wrong, bug, hooks = run_cells(
        TRAIN.format(**names), WRONG.format(**names), "1 / 0",
        "shell = get_ipython(); print(shell.custom_exceptions, shell.CustomTB.__qualname__)",
        folder=tmp_path,
    )  # fmt: skip
    text = shown(trained)
    assert '<progress value="2" max="2">' in text and "2/2" in text
    assert "<caption>Data</caption>" in text and "First dropped rows" in text
    assert 'href="run/report.html"' in text and (tmp_path / "run" / "report.html").is_file()
    assert "step=2 loss=" in text
    (error,) = (output for output in wrong if output.output_type == "error")
    assert error.ename == "DataError" and len(error.traceback) == 1
    assert error.traceback[0].startswith("DataError: wrong.jsonl:1:30: corrupt JSON")
    assert "\n" not in error.traceback[0]
    assert "Traceback" not in shown(wrong)
    # An error of another kind is shown as before, and no hook is left.
    assert bug[-1].ename == "ZeroDivisionError"
    assert len("\n".join(bug[-1].traceback).splitlines()) > 3
    assert shown(hooks).startswith("()")
