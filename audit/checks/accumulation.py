"""Gradient accumulation changes nothing but the memory.

Steps of 8 rows with unequal lengths, as one, two and eight micro-batches, in DPO and in SFT. Losses
and gradient norms of every step must agree.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, relative, within

TITLE = "Gradient accumulation changes nothing"
BOUND, STEPS = 1e-3, 5
MICRO = (8, 4, 1)


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    data = {"dpo": inputs.pairs(40), "sft": inputs.answers(40)}
    found = {}
    for stage, rows in data.items():
        path = inputs.write_rows(folder / f"{stage}.jsonl", rows)
        runs = [
            trainer.call(
                "train", model=model, rows=path, out=folder / f"{stage}-{micro}", stage=stage,
                batch=8, micro=micro, steps=STEPS,
            )
            for micro in MICRO
        ]  # fmt: skip
        for key in ("losses", "norms"):
            found[f"{stage} {key}"] = max(relative(run[key], runs[0][key]) for run in runs[1:])
    return within(BOUND, found)
