"""Trees over separate rows: the same training with `train.attention: auto` and `separate`.

    python tests/benchmarks/bench_trees.py [--data hh.jsonl] [--repeats 5]

Three sets of pairs from HH-RLHF transcripts: unchanged; with prompts of three times the answers, as
long conversations have; and eight pairs per prompt with five answers, as in SHP and UltraFeedback,
where trees hold a whole prompt (`dpo.group_by_prompt`). Each measurement is a separate process, and
the sides alternate. Timed: from the end of the first optimizer step to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import (
    MAX_LENGTH,
    PAIRS_A_STEP,
    SEED,
    VOCABULARY,
    Figure,
    alternating,
    apart,
    median,
    parsed,
    parser,
    place,
    read_transcripts,
    spread,
    train_ours,
    verdicts,
    write_lines,
    write_model,
    write_tokenizer,
)

REQUIRED = {"hh": 1.5, "talks": 1.8, "grouped": 4.0}
PROMPT_SHARE = 3
PAIRS_A_PROMPT, ANSWERS_A_PROMPT = 8, 5
Pairs = list[dict[str, str]]


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write tokenizer, model and the three sets of pairs."""
    pairs = read_transcripts(options.data)
    tokenizer = write_tokenizer(pairs, options.folder / "model", VOCABULARY)
    write_model(options.folder / "model", VOCABULARY)
    count = options.steps * PAIRS_A_STEP
    draw = random.Random(SEED)
    made = {
        "hh": as_they_are(pairs, count, tokenizer, draw),
        "talks": talks(pairs, count, tokenizer, draw),
        "grouped": grouped(pairs, count, draw),
    }
    for name, rows in made.items():
        write_lines(options.folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in made.items()}


def length(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of a text."""
    return len(tokenizer(text)["input_ids"])


def as_they_are(pairs: Pairs, count: int, tokenizer: Any, draw: random.Random) -> Pairs:
    """Sample pairs that fit in one row, with repetition if there are too few."""
    fitting = [
        pair
        for pair in pairs
        if length(tokenizer, pair["prompt"])
        + max(length(tokenizer, pair[side]) for side in ("chosen", "rejected"))
        < MAX_LENGTH
    ]
    rows = draw.sample(fitting, min(count, len(fitting)))
    return [rows[i % len(rows)] for i in range(count)]


def talks(pairs: Pairs, count: int, tokenizer: Any, draw: random.Random) -> Pairs:
    """Make prompts `PROMPT_SHARE` times as long as an answer with earlier conversations."""
    rows = []
    for pair in as_they_are(pairs, count, tokenizer, draw):
        answers = [length(tokenizer, pair[side]) for side in ("chosen", "rejected")]
        wanted = min(PROMPT_SHARE * sum(answers) // 2, MAX_LENGTH - max(answers) - 2)
        prompt = pair["prompt"]
        while length(tokenizer, prompt) < wanted:
            earlier = draw.choice(pairs)
            prompt = earlier["prompt"] + earlier["chosen"] + prompt
        ids = tokenizer(prompt)["input_ids"]
        rows.append(pair | {"prompt": tokenizer.decode(ids[max(0, len(ids) - wanted) :])})
    return rows


def grouped(pairs: Pairs, count: int, draw: random.Random) -> Pairs:
    """Make `PAIRS_A_PROMPT` pairs from `ANSWERS_A_PROMPT` answers for each prompt."""
    short = [pair for pair in pairs if len(pair["prompt"]) < 1200]
    answers = sorted({pair["chosen"] for pair in pairs if 40 < len(pair["chosen"]) < 500})
    every = [(a, b) for a in range(ANSWERS_A_PROMPT) for b in range(ANSWERS_A_PROMPT) if a != b]
    rows: Pairs = []
    for pair in draw.sample(short, -(-count // PAIRS_A_PROMPT)):
        of_prompt = draw.sample(answers, ANSWERS_A_PROMPT)
        for a, b in draw.sample(every, PAIRS_A_PROMPT):
            names = {"chosen": of_prompt[a], "rejected": of_prompt[b]}
            rows.append({"prompt": pair["prompt"]} | names)
    return rows[:count]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement: `trees:NAME` or `rows:NAME`."""
    kind, name = options.side.split(":")
    return train_ours(
        options.folder,
        options.folder / f"{name}.jsonl",
        place() / "run",
        steps=options.steps,
        threads=options.threads,
        attention="auto" if kind == "trees" else "separate",
        group_by_prompt=kind == "trees" and name == "grouped",
    )


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(prepare(options) if options.side == "prepare" else run(options)))
        return 0
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = {"data": options.data, "steps": options.steps}
        print(apart(__file__, "prepare", Path(folder), options.threads, **given), flush=True)
        for name in options.kinds.split(","):
            sides = {
                kind: lambda side=f"{kind}:{name}": apart(
                    __file__, side, Path(folder), options.threads, **given
                )
                for kind in ("rows", "trees")
            }
            print(f"{name}:", flush=True)
            found = alternating(sides, options.repeats)
            speeds = {kind: [m["training_pairs_per_s"] for m in found[kind]] for kind in found}
            print(f"{name}, pairs/s: " + "; ".join(f"{k} {spread(v)}" for k, v in speeds.items()))
            ratio = median(found["trees"], "training_pairs_per_s") / median(
                found["rows"], "training_pairs_per_s"
            )
            figures.append(Figure(f"{name}, trees : rows", ratio, REQUIRED[name]))
    verdicts(figures)
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=2)
    found.add_argument("--kinds", default=",".join(REQUIRED), help="which, with commas between")
    found.add_argument("--steps", type=int, default=6, help="optimizer steps a measurement")
    return parsed(found)


if __name__ == "__main__":
    sys.exit(main())
