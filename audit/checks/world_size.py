"""The number of processes changes nothing but the time.

The same steps of 8 rows on one process and on two (DDP), in DPO and in SFT. Losses and gradient
norms of every step must agree.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, relative, within

TITLE = "World size changes nothing"
BOUND, STEPS = 1e-3, 5


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    data = {"dpo": inputs.pairs(40), "sft": inputs.answers(40)}
    found = {}
    for stage, rows in data.items():
        path = inputs.write_rows(folder / f"{stage}.jsonl", rows)
        asked = {"model": model, "rows": path, "stage": stage, "batch": 8, "steps": STEPS}
        one = trainer.call("train", out=folder / f"{stage}-1", **asked)
        two = trainer.call("train", 2, out=folder / f"{stage}-2", micro=4, **asked)
        for key in ("losses", "norms"):
            found[f"{stage} {key}"] = relative(two[key], one[key])
    return within(BOUND, found)
