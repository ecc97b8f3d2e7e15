"""Cost of the loop per step beyond forward, backward and optimizer, for a million parameters.

    python tests/benchmarks/bench_loop.py [--data hh.jsonl] [--repeats 5]

In one process the run's own loop trains for some steps, and a bare loop does the same forwards,
backwards, clipping and steps on the same prebuilt micro-batches. The cost of the loop is the
difference: building batches, counting, logging, signals and heartbeats.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    PAIRS_A_STEP,
    RATE,
    SEED,
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

# 0.25 million parameters in embedding and head each, half a million in the layers.
VOCABULARY = 2048
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
REQUIRED_MS = 3.0


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write tokenizer, model and the shortest of the pairs."""
    pairs = read_transcripts(options.data)
    write_tokenizer(pairs, options.folder / "model", VOCABULARY)
    write_model(options.folder / "model", VOCABULARY, **SMALL)
    pairs.sort(key=lambda pair: sum(map(len, pair.values())))
    rows = pairs[: max(PAIRS_A_STEP, len(pairs) // 4)]
    count = options.steps * PAIRS_A_STEP
    write_lines(options.folder / "pairs.jsonl", random.Random(SEED).choices(rows, k=count))
    return {"pairs": count}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement: return milliseconds per step of both loops."""
    from modern_llm.training import stage

    bare: list[float] = []
    train = stage.train

    def both(runtime: Any, scorer: Any, task: Any, run: Any, *args: Any) -> Any:
        bare.append(bare_loop(copy.deepcopy(scorer), task, run.config, options.steps))
        return train(runtime, scorer, task, run, *args)

    stage.train = both
    found = train_ours(
        options.folder,
        options.folder / "pairs.jsonl",
        place() / "run",
        steps=options.steps,
        threads=options.threads,
    )
    whole = 1e3 * PAIRS_A_STEP / found["training_pairs_per_s"]
    return {"loop_ms": whole, "bare_ms": 1e3 * bare[0], "cost_ms": whole - 1e3 * bare[0]}


def bare_loop(scorer: Any, task: Any, config: Any, steps: int) -> float:
    """Return seconds per step, without the first, of the work that every loop needs."""
    import torch

    from modern_llm.training.optimizers import make_optimizer

    batches = [list(task.micro_batches(step)) for step in range(steps)]
    optimizer = make_optimizer(config, scorer.train())
    began = 0.0
    for step, parts in enumerate(batches):
        if step == 1:
            began = time.perf_counter()
        for batch in parts:
            (task.run(scorer, batch).loss / task.denominator(step)).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    assert config.learning_rate == RATE
    return (time.perf_counter() - began) / (steps - 1)


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(prepare(options) if options.side == "prepare" else run(options)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = {"data": options.data, "steps": options.steps}

        def measure(side: str) -> dict[str, Any]:
            return apart(__file__, side, Path(folder), options.threads, **given)

        measure("prepare")
        found = alternating({"both": lambda: measure("both")}, options.repeats)["both"]
    for name in ("bare_ms", "loop_ms", "cost_ms"):
        print(f"{name}: {spread(m[name] for m in found)}")
    cost = median(found, "cost_ms")
    verdicts([Figure("cost of the loop", cost, REQUIRED_MS, at_least=False, unit="ms a step")])
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=5, sides=("prepare", "both"))
    found.add_argument("--steps", type=int, default=60, help="optimizer steps a measurement")
    return parsed(found)


if __name__ == "__main__":
    sys.exit(main())
