"""A run that was killed in the middle of an epoch ends with the weights of an undisturbed one.

16 steps of 8 rows out of 56: an epoch is 7 steps. A checkpoint is written every 5 steps, the
process is killed after step 12, and the same call resumes from step 10, in the middle of the second
epoch. In DPO and in SFT.
"""

from pathlib import Path

import inputs
from frame import Failed, Outcome, Trainer, difference, relative, within

TITLE = "A resume in mid-epoch equals an undisturbed run"
BOUND, STEPS = 1e-6, 16


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    data = {"dpo": inputs.pairs(56), "sft": inputs.answers(56)}
    found = {}
    for stage, rows in data.items():
        path = inputs.write_rows(folder / f"{stage}.jsonl", rows)
        asked = {"model": model, "rows": path, "stage": stage, "batch": 8, "steps": STEPS}
        asked["save_every"] = 5
        whole = trainer.call("train", out=folder / f"{stage}-whole", **asked)
        out = folder / f"{stage}-killed"
        killed = trainer.attempt("train", out=out, die_after_step=12, **asked)
        if killed.done:
            raise Failed("the run that should have been killed came to its end")
        resumed = trainer.call("train", out=out, **asked)
        found[f"{stage} weights"] = difference(resumed["weights"], whole["weights"])
        found[f"{stage} losses"] = relative(resumed["losses"], whole["losses"])
    return within(BOUND, found, "weights and losses bit for bit")
