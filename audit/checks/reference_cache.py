"""Stored reference values are never those of other weights, tokenizer or truncation.

All runs share one cache, which the first's reference fills before. The second has other weights,
the third another tokenizer, the fourth another `max_length`; the fifth has the first's model again.
Each must start at a loss of ln 2: a value of an earlier run gives another loss. How many responses
are scored again under another learning rate is told and not judged.
"""

import math
from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged

TITLE = "The reference cache is never stale"
BOUND = 1e-4


def run(trainer: Trainer, folder: Path) -> Outcome:
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(8, longest=30))
    first = inputs.model(folder / "first")
    other = inputs.model(folder / "other", seed=1)
    merges = inputs.model(folder / "merges", vocabulary=330)
    runs = {
        "first": {"model": first},
        "other weights": {"model": other},
        "other tokenizer": {"model": merges},
        "other truncation": {"model": first, "max_length": 32},
        "first again": {"model": first},
    }
    filled = {"model": first, "rows": rows}
    trainer.call("score_reference", out=folder / "fill", rate=1e-3, **filled)
    off = {}
    for number, (name, asked) in enumerate(runs.items()):
        out = folder / f"out-{number}"
        answer = trainer.call("train", rows=rows, out=out, batch=8, steps=1, **asked)
        off[name] = abs(answer["losses"][0] - math.log(2))
    again = trainer.call("score_reference", out=folder / "again", rate=5e-4, **filled)
    stale = [name for name, value in off.items() if value > BOUND]
    text = f"at most {max(off.values()):.0e} from ln 2"
    if stale:
        text = f"stale after: {', '.join(stale)}"
    text += f"; another learning rate scores {again['scored']} of 16 responses again"
    return judged(not stale, text, differences=off, scored_again=again["scored"])
