"""Tokenising and planning of many pairs.

    python tests/benchmarks/bench_data.py [--data hh.jsonl] [--pairs 100000]

The pairs are the transcripts of FILE, each with a number inserted so that no two are equal.
Tokenising: building the token tables from the lines of the file (rows checked, truncated, digested,
written), compared with the batch call of `tokenizers` alone on the same texts in memory. Planning:
the pairs of every step of an epoch, and the process of each, for 8 processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    GPT2,
    MAX_LENGTH,
    SEED,
    TURN,
    VOCABULARY,
    Figure,
    alternating,
    apart,
    median,
    parsed,
    parser,
    place,
    read_lines,
    read_transcripts,
    spread,
    verdicts,
    write_lines,
    write_tokenizer,
)

REQUIRED = {"tokenising": 1.3, "planning": 20_000}
BATCH, TOKENS, WORLD = 64, 4096, 8


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the tokenizer and the pairs."""
    rows = read_lines(options.data)
    lines = ({k: f"\n\nHuman: {n}{v}" for k, v in rows[n % len(rows)].items() if k in
              ("chosen", "rejected")} for n in range(options.pairs))  # fmt: skip
    write_lines(options.folder / "pairs.jsonl", lines)
    if not GPT2.is_dir():
        write_tokenizer(read_transcripts(options.data), options.folder / "tokenizer", VOCABULARY)
    return {"pairs": options.pairs, "gpt2 tokenizer": GPT2.is_dir()}


def tokenizer_of(options: argparse.Namespace) -> Any:
    """Return the GPT-2 tokenizer if it is available, else the one trained on the data."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(GPT2 if GPT2.is_dir() else options.folder / "tokenizer")


def raw(options: argparse.Namespace) -> dict[str, Any]:
    """Run the batch call alone, a thousand rows at a time."""
    backend = tokenizer_of(options).backend_tokenizer
    texts: list[list[str]] = []
    for start, row in enumerate(read_lines(options.folder / "pairs.jsonl")):
        if start % 1000 == 0:
            texts.append([])
        prompt, _, chosen = row["chosen"].rpartition(TURN)
        texts[-1] += [prompt + TURN, chosen, row["rejected"].rpartition(TURN)[2]]
    began = time.perf_counter()
    for batch in texts:
        backend.encode_batch_fast(batch, add_special_tokens=False)
    return {"seconds": time.perf_counter() - began}


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """Build the tables, then plan an epoch over them."""
    import numpy as np

    from modern_llm.config import PreferenceDatasetConfig
    from modern_llm.data.batch.micro_batches import BatchSource
    from modern_llm.data.batch.order import Budget, Order, Sharing
    from modern_llm.data.batch.prefix_tree import Examples
    from modern_llm.data.table.build import prepare_tables

    config = PreferenceDatasetConfig(dataset_name=str(options.folder / "pairs.jsonl"))
    tokenizer = tokenizer_of(options)
    began = time.perf_counter()
    prepared = prepare_tables(config, tokenizer, place() / "tables", max_length=MAX_LENGTH)
    seconds = time.perf_counter() - began
    rows = len(prepared.train)
    order = Order(rows, BATCH, SEED)
    source = BatchSource(
        Examples(prepared.train, trees=True),
        order,
        Budget(tokens=TOKENS),
        rank=0,
        world=WORLD,
        shared=Sharing.LINE,
    )
    began = time.perf_counter()
    planned = sum(
        sum(map(len, part)) for step in range(rows // BATCH) for part in
        source.parts(np.asarray(order.step(step)))
    )  # fmt: skip
    assert planned == rows // BATCH * BATCH
    rate = planned / (time.perf_counter() - began)
    return {"seconds": seconds, "planned_per_s": rate, "rows": rows}


SIDES = {"prepare": prepare, "raw": raw, "tables": tables}


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = {"data": options.data, "pairs": options.pairs}

        def measure(side: str) -> dict[str, Any]:
            return apart(__file__, side, Path(folder), options.threads, **given)

        print(measure("prepare"), flush=True)
        sides = {side: lambda side=side: measure(side) for side in ("raw", "tables")}
        found = alternating(sides, options.repeats)
    for side, measured in found.items():
        print(f"{side}: {spread(m['seconds'] for m in measured)} s")
    ratio = median(found["tables"], "seconds") / median(found["raw"], "seconds")
    verdicts(
        [
            Figure("tables : raw batch call", ratio, REQUIRED["tokenising"], at_least=False),
            Figure(
                "planning", median(found["tables"], "planned_per_s"), REQUIRED["planning"],
                unit="pairs/s",
            ),
        ]
    )  # fmt: skip
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=1, sides=SIDES)
    found.add_argument("--pairs", type=int, default=100_000)
    return parsed(found)


if __name__ == "__main__":
    sys.exit(main())
