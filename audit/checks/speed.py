"""Speed and memory on a real model, SmolLM2-135M-Instruct, in float32 on two threads.

Steps of 4 pairs of about 250 tokens, with the reference scored before; timed from the end of the
first step to the end of the last. Of the micro-batches of 1 and 4 pairs the faster counts. Pairs
per second, per second of processor time, and peak memory are told and not judged.
"""

import shutil
from pathlib import Path

import inputs
from frame import MEASURED, NOT_HERE, Outcome, Skipped, Trainer

TITLE = "Speed and memory on a real model"
BATCH, STEPS, THREADS = 4, 4, 2


def run(trainer: Trainer, folder: Path) -> Outcome:
    if trainer.real_model is None:
        reason = "no real model was given: examples/real_model/get_model.py FOLDER, --model FOLDER"
        raise Skipped(NOT_HERE, reason)
    trainer.threads = THREADS
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(BATCH * STEPS, longest=180))
    found = {}
    for micro in (1, BATCH):
        out = folder / f"out-{micro}"
        answer = trainer.call(
            "train", model=trainer.real_model.resolve(), rows=rows, out=out, batch=BATCH,
            micro=micro, steps=STEPS, max_length=512, rate=1e-6,
        )  # fmt: skip
        pairs = BATCH * (STEPS - 1)
        found[micro] = {
            "pairs_per_s": pairs / answer["seconds"],
            "pairs_per_cpu_s": pairs / answer["cpu_seconds"],
            "peak_gb": answer["peak_gb"],
            "first_loss": answer["losses"][0],
        }
        shutil.rmtree(out)
    micro = max(found, key=lambda size: found[size]["pairs_per_s"])
    best = found[micro]
    text = (
        f"{best['pairs_per_s']:.2f} pairs/s ({best['pairs_per_cpu_s']:.2f} per second of processor "
        f"time), {best['peak_gb']:.1f} GB; micro-batches of {micro}"
    )
    return Outcome(MEASURED, text, {str(size): value for size, value in found.items()})
