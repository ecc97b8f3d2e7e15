"""After a kill inside a save the same call resumes, and ends as if undisturbed.

A run of 8 steps saves after steps 3 and 6. It is killed (SIGKILL) inside the second save, at six
changes of the folder spread over all that this save makes. Then the same call is made again: it
must resume from one of both checkpoints and end with the weights of an undisturbed run. Where it
does not, resuming from the first checkpoint by its name is tried and told.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, difference, judged

TITLE = "A kill inside a save leaves a usable checkpoint"
POINTS, BOUND = 6, 1e-6


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(40))
    asked = {"model": model, "rows": rows, "batch": 8, "steps": 8, "save_every": 3}
    whole = trainer.call("train", out=folder / "whole", watched_save=6, **asked)
    events = whole["events"]
    points = sorted({1 + (events - 1) * at // (POINTS - 1) for at in range(POINTS)})
    found = {}
    for point in points:
        out = folder / f"killed-{point}"
        killed = trainer.attempt("train", out=out, watched_save=6, kill_at=point, **asked)
        found[point] = "was not killed" if killed.done else after(trainer, out, whole, asked)
    good = sum(value == "resumed" for value in found.values())
    text = f"the same call resumes after {good} of {len(points)} kills"
    others = sorted(set(found.values()) - {"resumed"})
    text += f" among the {events} changes of a save" if not others else f"; {'; '.join(others)}"
    return judged(good == len(points), text, events=events, points=found)


def after(trainer: Trainer, out: Path, whole: dict, asked: dict) -> str:
    """Say what the same call does after a kill."""
    again = trainer.attempt("train", out=out, **asked)
    if again.done:
        off = difference(again.answer["weights"], whole["weights"])
        return "resumed" if off <= BOUND else "resumed, with other weights at the end"
    first = trainer.call("checkpoints", out=out)["folders"][0]
    named = trainer.attempt("train", out=out, from_checkpoint=first, **asked)
    if named.done and difference(named.answer["weights"], whole["weights"]) <= BOUND:
        return "else an error, and the checkpoint before it resumes when named"
    return "else an error, also when the checkpoint before it is named"
