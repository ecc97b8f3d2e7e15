"""The table of `plan` fits the terminal, with no cell cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from modern_llm.verbs.plan_table import PARTS, show_plan

ROW = {
    "preset": "zero3_offload", "checkpointing": True, "reference": "cache",
    "device": dict.fromkeys(PARTS, 123.4e9), "device_total": 863.8e9,
    "host": {"optimizer": 1234.5e9}, "tokens": 1_048_576, "fits": False,
}  # fmt: skip
RESULT = {
    "model": "some/model", "parameters": 70_000_000_000, "trained": 70_000_000_000,
    "precision": "bf16", "gpus": 8, "gpu_memory": 80e9, "usable": 72e9, "seconds": None,
    "recommended": None, "fits_with": "--mlp_chunk 8192",
    "rows": [ROW, ROW | {"reference": "model", "fits": True}],
}  # fmt: skip


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (160, 1)])
def test_every_number_is_whole_at_this_width(width, tables):
    shown = io.StringIO()
    show_plan(RESULT, Console(file=shown, width=width, markup=False, emoji=False))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in shown.getvalue()
    assert sum(line.startswith("preset") for line in lines) == tables
    assert shown.getvalue().count("123.4") == 2 * len(PARTS)
    for text in ("zero3_offload*", "1,048,576", "863.8", "1234.5", "yes", "no", "--mlp_chunk 8192"):
        assert text in shown.getvalue()
