"""The GPU benchmark on a CPU with a tiny shape: its sides, its table, its exit without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import gpu
    finally:
        sys.path.remove(str(SCRIPT.parent))
    return gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_prints_that_and_succeeds():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "gpu: skipped, there is no CUDA device\n")


@pytest.mark.slow
def test_both_layouts_train_the_same_and_the_table_has_the_requirements(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_PLACE", str(tmp_path / "place"))
    words = "--tiny 1 --pairs 8 --micro_batch 8 --steps 6 --warm 2 --shape 1.2B --folder".split()
    options = gpu.parse([*words, str(tmp_path)])
    facts = gpu.prepare(options)
    assert facts["pairs"] > 300
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == len(rows) == facts["pairs"]
    from modern_llm.training import stage

    monkeypatch.setattr(stage, "export", stage.export)  # restored after the script replaces it
    ours = gpu.run_ours(options)
    assert ours["losses"] == pytest.approx(ours["rows_losses"], rel=1e-4)
    assert set(ours["losses"]) == {1, 2, 4, 6} and len(set(ours["losses"].values())) == 4
    assert ours["pairs_per_s"] > 0 and ours["peak_gb"] > 0 and 0 < ours["prefix_saving"] < 1

    trl = {"pairs_per_s": ours["pairs_per_s"] / 4, "peak_gb": ours["peak_gb"] * 4}
    found = {"1.2B": {"ours": [ours] * 3, "trl": [trl] * 3}}
    verdicts = {f.name: f for f in gpu.figures(found)}
    assert verdicts["1.2B: pairs/s over TRL"].value == pytest.approx(4)
    assert verdicts["1.2B: peak memory over TRL"].reached
    assert len(verdicts) == 4 and verdicts["1.2B: MFU"].required == 0.45
    assert [f.name for f in gpu.figures({"0.5B": {"ours": [ours]}})] == [
        "0.5B: trees over packed rows"
    ]
    text = gpu.table(found, "synthetic")
    assert re.match(r"Device: .*\. Date: \d{4}-\d\d-\d\d\. Versions: .*torch \d", text)
    assert re.search(r"\| 1.2B: pairs/s over TRL \| 4 \| >= 3 \|", text)
    assert "| 1.2B ours rows_pairs_per_s | 3 |" in text


def test_rounds_end_with_the_time(gpu, monkeypatch, tmp_path):
    now, made = [0.0], []

    def apart(script, side, folder, threads, **options):
        made.append((side, options["shape"]))
        now[0] += {"prepare": 20, "ours": 50, "trl": 60}[side]
        return {"pairs_per_s": 1.0, "peak_gb": 1.0}

    monkeypatch.setattr(gpu, "apart", apart)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    found = gpu.rounds(gpu.parse([]), "0.5B", tmp_path, until=250.0)
    assert [side for side, _ in made] == ["prepare", "ours", "trl", "ours", "trl"]
    assert {side: len(each) for side, each in found.items()} == {"ours": 2, "trl": 2}
    assert now[0] <= 250
    # A side that takes too long is still measured once.
    found = gpu.rounds(gpu.parse([]), "0.5B", tmp_path, until=0.0)
    assert {side: len(each) for side, each in found.items()} == {"ours": 1, "trl": 1}


def test_the_shapes_have_the_sizes_in_their_names(gpu):
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, shape in gpu.SHAPES.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=gpu.VOCABULARY, **shape))
        billions = sum(p.numel() for p in model.parameters()) / 1e9
        assert billions == pytest.approx(float(name[:-1]), rel=0.04), (name, billions)
