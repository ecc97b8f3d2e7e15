"""Rows that share one forward do not see each other (SFT).

Eight rows in one step: once a row per forward, once all in one forward, packed where the trainer
has packing. Loss and gradient norm of the step must be the same.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged, relative

TITLE = "Packed rows do not leak"
BOUND = 1e-4


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.answers(8, longest=16))
    asked = {"model": model, "rows": rows, "stage": "sft", "steps": 1}
    apart = trainer.call("train", out=folder / "apart", batch=8, micro=1, **asked)
    packed = trainer.call(
        "train", out=folder / "packed", max_length=512, **asked, **packing(trainer)
    )
    loss = relative(packed["losses"], apart["losses"])
    norm = abs(packed["norms"][0] / apart["norms"][0] - 1)
    text = f"loss off by {loss:.0e}, gradient norm by {norm:.0e} (relative)"
    return judged(max(loss, norm) <= BOUND, text, loss=loss, gradient_norm=norm, bound=BOUND)


def packing(trainer: Trainer) -> dict:
    """Return the options with which the trainer has eight rows in one forward."""
    if trainer.name == "modern_llm":  # packs the rows of a micro-batch
        return {"batch": 8, "micro": 8}
    return {"batch": 1, "packing": True}  # one packed row of all eight
