"""A run trains its rows as fast as the same rows alone in a fresh process."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.text import make_checkpoint, write_jsonl

ROOT = Path(__file__).resolve().parents[2]

RUN = """
import json, sys, time
import torch
import modern_llm as ml

threads, loss = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
marks = []

class Steps(ml.Callback):
    def on_train_begin(self, *_):
        marks.append(time.perf_counter())

    def on_step_end(self, *_):
        marks.append(time.perf_counter())

ml.run_dpo(
    "model",
    ml.TrainingConfig(run_name="rate", output_dir=f"run-{loss}", batch_size=8, max_steps=8),
    ml.DPOConfig(loss_type=loss, max_length=1024),
    "pairs.jsonl",
    callbacks=[Steps()],
)
print(json.dumps(8 / min(b - a for a, b in zip(marks[1:], marks[2:]))))
"""

ALONE = """
import json, sys, time
from pathlib import Path
import torch
import modern_llm as ml
from modern_llm.data.table.build import prepare_tables
from modern_llm.models.load import load_model, load_tokenizer, make_scorer

torch.set_num_threads(int(sys.argv[1]))
data = ml.PreferenceDatasetConfig(dataset_name="pairs.jsonl")
table = prepare_tables(data, load_tokenizer("model"), Path("tables"), max_length=1024).train
scorer = make_scorer(load_model("model"), dropout=False)
collator = ml.PairCollator(table, scorer)
batches = [collator([index]) for index in range(8)]
times = []
for _ in range(8):
    began = time.perf_counter()
    for batch in batches:
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        output.logprobs.sum().backward()
    times.append(time.perf_counter() - began)
print(json.dumps(8 / min(times)))
"""


def same_sizes(count: int) -> list[dict[str, str]]:
    """Pairs of random digits: all of the same number of tokens, so that all steps are equal."""
    draw = random.Random(0)

    def digits(n: int) -> str:
        return "".join(draw.choices("0123456789", k=n))

    sizes = {"prompt": 120, "chosen": 260, "rejected": 260}
    return [{name: digits(n) for name, n in sizes.items()} for _ in range(count)]


def measured(code: str, folder: Path, *words: str) -> float:
    """Run `code` in a process of its own; return the number on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": words[0],
            "OMP_WAIT_POLICY": "passive",
            "MODERN_LLM_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_a_run_is_as_fast_as_its_rows_alone(threads, loss, tmp_path, tiny_tokenizer):
    """`sigmoid` scores a reference first, in lanes with threads of their own; `simpo` has none.

    Best of the steps, on a machine without other work: wall-clock time, because a thread that
    sleeps where it should compute costs no processor time.
    """
    shape = {"d_model": 256, "n_layers": 6, "max_seq_len": 1024}
    make_checkpoint(tmp_path / "model", tiny_tokenizer, **shape)
    write_jsonl(tmp_path / "pairs.jsonl", same_sizes(64))
    alone = measured(ALONE, tmp_path, threads)
    run = measured(RUN, tmp_path, threads, loss)
    again = measured(ALONE, tmp_path, threads)
    print(f"{threads} threads, {loss}: {run:.2f} pairs/s, alone {alone:.2f} and {again:.2f}")
    assert run >= 0.9 * max(alone, again)
