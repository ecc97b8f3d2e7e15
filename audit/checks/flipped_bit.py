"""One flipped bit in a checkpoint is seen.

One bit of a number in the file of the weights, and in that of the optimizer, the two largest of a
checkpoint. The same call must end with an error, or with the weights of an undisturbed run (from an
earlier checkpoint). Silently other weights are a failure.
"""

import shutil
from pathlib import Path

import inputs
from frame import Failed, Outcome, Trainer, difference, judged

TITLE = "One flipped bit in a checkpoint is seen"


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(40))
    asked = {"model": model, "rows": rows, "batch": 8, "steps": 8, "save_every": 3}
    whole = trainer.call("train", out=folder / "whole", **asked)
    killed = folder / "killed"
    trainer.attempt("train", out=killed, die_after_step=7, **asked)
    last = Path(trainer.call("checkpoints", out=killed)["folders"][-1])
    files = sorted(last.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)[-2:]
    found = {}
    for path in files:
        kept = folder / "kept"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(killed, kept)
        flip(path)
        again = trainer.attempt("train", out=killed, **asked)
        found[path.name] = seen(again, whole)
        shutil.rmtree(killed)
        kept.rename(killed)
    text = "; ".join(f"{name}: {value}" for name, value in sorted(found.items()))
    return judged(not any("silent" in value for value in found.values()), text, files=found)


def flip(path: Path) -> None:
    """Flip the lowest bit of an exponent in the middle of a file: a number of 4 times the size.

    The byte is the highest of a float32 between 0.001 and 1, so that it is a number in use.
    """
    data = bytearray(path.read_bytes())
    near = range(len(data) // 2, len(data))
    place = next((at for at in near if data[at] & 0x7F in (0x3A, 0x3C)), None)
    if place is None:
        raise Failed(f"{path} has no such number in its second half")
    data[place] ^= 1
    path.write_bytes(data)


def seen(again, whole: dict) -> str:
    """Say what the same call did about it."""
    if not again.done:
        return "an error"
    off = difference(again.answer["weights"], whole["weights"])
    return "weights as undisturbed" if off == 0 else "silently other weights at the end"
