"""Truncation keeps the prompts of both responses equal.

The pairs are longer than `max_length`: long prompts, long responses, and one long response of two.
A pair whose responses follow different prompts compares answers to different questions.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged

TITLE = "Truncation keeps both prompts equal"
LENGTHS = (24, 40, 64)


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.pairs(24, longest=40)
    for number, row in enumerate(rows):  # of every third pair one response is far longer
        if number % 3 == 0:
            row["chosen"] += " " + row["chosen"] * 3
    path = inputs.write_rows(folder / "rows.jsonl", rows)
    unequal = empty = kept = long = 0
    for limit in LENGTHS:
        out = folder / f"{limit}.jsonl"
        found = trainer.call("tokens", model=model, rows=path, out=out, max_length=limit)["rows"]
        for row in found:
            prompts = row["prompt_ids"], row.get("prompt_of_rejected_ids", row["prompt_ids"])
            unequal += prompts[0] != prompts[1]
            sides = row["chosen_ids"], row["rejected_ids"]
            empty += not all(sides)
            long += any(len(prompts[0]) + len(side) > limit for side in sides)
        kept += len(found)
    asked = len(rows) * len(LENGTHS)
    text = f"{unequal} of {kept} pairs with unequal prompts"
    if empty or long:
        text += f", {empty} with an empty response, {long} longer than max_length"
    text += f"; {asked - kept} of {asked} pairs left out"
    figures = {"unequal": unequal, "empty": empty, "too_long": long, "kept": kept, "asked": asked}
    return judged(not unequal and not empty and not long, text, **figures)
