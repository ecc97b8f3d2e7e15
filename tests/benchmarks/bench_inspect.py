"""Duration of the whole command `modern-llm inspect` for many pairs.

    python tests/benchmarks/bench_inspect.py --data FILE --tokenizer FOLDER --pairs 100000

FILE holds HH-RLHF transcripts. They are repeated, each with a number inserted so that no two rows
are equal, up to `--pairs` rows."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def enlarged(source: Path, target: Path, pairs: int) -> None:
    """Write `pairs` different rows made from those of `source`."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with target.open("w", encoding="utf-8") as out:
        for number in range(pairs):
            row = rows[number % len(rows)]
            out.write(json.dumps({k: f"\n\nHuman: {number}{v}" for k, v in row.items()}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pairs", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        enlarged(options.data, file, options.pairs)
        words = ["inspect", "--data", str(file), "--tokenizer", options.tokenizer, "--json"]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "modern_llm", *words],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        seconds = time.perf_counter() - began
        result = json.loads(done.stdout.splitlines()[-1])
        tokens = sum(source["tokens"] for source in result["sources"])
        megabytes = file.stat().st_size / 1e6
    print(
        f"{result['rows']:,} pairs, {megabytes:.0f} MB, {tokens:,} tokens kept: {seconds:.1f} s "
        f"on {os.cpu_count()} cores"
    )


if __name__ == "__main__":
    main()
