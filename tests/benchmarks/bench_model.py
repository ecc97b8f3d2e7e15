"""Utilisation of the CPU in training, and the memory of a large vocabulary.

    python tests/benchmarks/bench_model.py [--data hh.jsonl] [--repeats 5]

Share of peak: `mfu` as a run logs it, median over its steps after the first: operations of the
ideal algorithm per second, relative to a large float32 matrix product on the same machine.

Vocabulary: the same model with 4,096 and with 50,257 rows in embedding and head. From the larger
peak, the weights, gradients and moments of the additional rows are subtracted; the rest is divided
by the smaller peak.
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
    GPT2,
    PAIRS_A_STEP,
    SEED,
    SHAPE,
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

LARGE = 50_257
SIDES = {"small": VOCABULARY, "large": LARGE}
REQUIRED = {"mfu": 0.55, "vocabulary": 1.25}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write both models with their tokenizers, and the pairs."""
    pairs = read_transcripts(options.data)
    for side, vocabulary in SIDES.items():
        folder = options.folder / side / "model"
        if side == "large" and GPT2.is_dir():
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(GPT2).save_pretrained(folder)
        else:
            write_tokenizer(pairs, folder, vocabulary)
        write_model(folder, vocabulary)
    count = options.steps * PAIRS_A_STEP
    write_lines(options.folder / "pairs.jsonl", random.Random(SEED).choices(pairs, k=count))
    return {"pairs": count, "gpt2 tokenizer": GPT2.is_dir()}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement of one of `SIDES`."""
    return train_ours(
        options.folder / options.side,
        options.folder / "pairs.jsonl",
        place() / "run",
        steps=options.steps,
        threads=options.threads,
    )


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(prepare(options) if options.side == "prepare" else run(options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = {"data": options.data, "steps": options.steps}
        print(apart(__file__, "prepare", Path(folder), options.threads, **given), flush=True)
        sides = {
            side: lambda side=side: apart(__file__, side, Path(folder), options.threads, **given)
            for side in SIDES
        }
        found = alternating(sides, options.repeats)
    for side, measured in found.items():
        shares = spread((m["mfu"] for m in measured), 3)
        print(f"{side}: mfu {shares}; GB {spread((m['peak_gb'] for m in measured), 3)}")
    # Embedding and head are two matrices; each has weights, gradients and two moments in float32.
    rows = 2 * (LARGE - VOCABULARY) * SHAPE["hidden_size"] * 4 * 4 / 1e9
    over = (median(found["large"], "peak_gb") - rows) / median(found["small"], "peak_gb")
    verdicts(
        [
            Figure("mfu", median(found["small"], "mfu"), REQUIRED["mfu"]),
            Figure(
                f"peak with {LARGE:,} rows less {rows:.3f} GB, over that with {VOCABULARY:,}",
                over,
                REQUIRED["vocabulary"],
                at_least=False,
            ),
        ]
    )
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=3)
    found.add_argument("--steps", type=int, default=8, help="optimizer steps a measurement")
    return parsed(found)


if __name__ == "__main__":
    sys.exit(main())
