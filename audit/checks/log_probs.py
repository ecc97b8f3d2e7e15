"""Log-prob sums of responses agree with a plain forward in float64.

The ids are those that the trainer itself trains on, so that templates and truncation play no part.
"""

from pathlib import Path

import inputs
from frame import Outcome, Trainer, judged

TITLE = "Log-probs agree with float64"
BOUND = 1e-3


def run(trainer: Trainer, folder: Path) -> Outcome:
    model = inputs.model(folder / "model")
    rows = inputs.write_rows(folder / "rows.jsonl", inputs.pairs(16, longest=40))
    asked = {"model": model, "rows": rows}
    ids = trainer.call("tokens", out=folder / "tokens.jsonl", **asked)["rows"]
    found = trainer.call("log_probs", out=folder / "scores.jsonl", **asked)["rows"]
    plain = inputs.log_probs(model, ids)
    both = zip(found, plain, strict=True)
    off = max(abs(a - b) for one, other in both for a, b in zip(one, other, strict=True))
    text = f"{off:.0e} nats at most, over {2 * len(plain)} responses"
    return judged(off <= BOUND, text, difference=off, bound=BOUND, responses=2 * len(plain))
