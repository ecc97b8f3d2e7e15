"""A bad row is named.

Line 23 of 40 is once broken JSON, once without a response, once with a number in place of a text.
The error must name the line or the row (counted from 0 or 1), or show words of it; a run that
trains on it, or drops it without a word, fails.
"""

import json
import re
from pathlib import Path

import inputs
from frame import Attempt, Outcome, Trainer, judged

TITLE = "A bad row is named"
LINE = 23
PLACE = re.compile(rf"(:|line |row |rows |index |example |#)\s*\(?({LINE - 1}|{LINE})(?!\d)", re.I)


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.pairs(40)
    bad = rows[LINE - 1]
    kinds = {
        "broken JSON": json.dumps(bad)[:-9],
        "no response": json.dumps({"prompt": bad["prompt"], "chosen": bad["chosen"]}),
        "a number": json.dumps(bad | {"rejected": 7}),
    }
    found = {}
    for number, (kind, line) in enumerate(kinds.items()):
        lines = [json.dumps(row) for row in rows]
        lines[LINE - 1] = line
        path = folder / f"rows-{number}.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        out = folder / f"out-{number}"
        attempt = trainer.attempt("train", model=model, rows=path, out=out, batch=8, steps=2)
        found[kind] = told(attempt, str(bad["prompt"]).partition(":")[0])
    text = "; ".join(f"{kind}: {value}" for kind, value in found.items())
    return judged(all(value == "named" for value in found.values()), text, kinds=found)


def told(attempt: Attempt, marker: str) -> str:
    """Say how the row was told of."""
    # Lines of tracebacks name lines of source text.
    lines = [line for line in attempt.text.splitlines() if not line.lstrip().startswith("File ")]
    text = "\n".join(lines)
    if PLACE.search(text) or marker in text:
        return "named"
    return "trained without a word" if attempt.done else "an error that does not name it"
