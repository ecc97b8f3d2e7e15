"""The DPO loss of the first step is ln 2.

Policy and reference are the same model, so that every reward is 0 and the loss of a pair ln 2.
Asked with the trainer's stored reference, and 8 pairs of unequal lengths.
"""

import math
from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged

TITLE = "The loss of step 1 is ln 2"
BOUND = 1e-4


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(8))
    answer = trainer.call("train", model=model, rows=rows, out=folder / "out", batch=8, steps=1)
    off = abs(answer["losses"][0] - math.log(2))
    return judged(off <= BOUND, f"{off:.0e} from ln 2", difference=off, bound=BOUND)
