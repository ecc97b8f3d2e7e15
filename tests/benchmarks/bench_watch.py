"""Cost of monitoring per step: display, `metrics.jsonl`, warnings and trackers.

python tests/benchmarks/bench_watch.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from modern_llm.config import TrainingConfig
from modern_llm.training.monitoring.monitor import Monitor
from modern_llm.training.run.folder import RunFolder

STEPS = 2000
RECORD = {f"metric/{n}": float(n) for n in range(20)} | {"loss": 0.5, "grad_norm": 1.0}


def cost(every: int, trackers: list[str]) -> float:
    """Return the milliseconds per step, over all steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            run_name="watched", output_dir=Path(folder), log_every=every, trackers=trackers
        )
        run = RunFolder(config, {"train": {"run_name": "watched"}})
        with Monitor(config, run, STEPS, 0, True) as watch:
            began = time.perf_counter()
            for step in range(1, STEPS + 1):
                watch.advance(step)
                if step % every == 0:
                    watch.record(step, RECORD | {"step": step})
            return (time.perf_counter() - began) / STEPS * 1e3


def main() -> None:
    for trackers in ([], ["tensorboard"]):
        for every in (1, 10):
            found = sorted(cost(every, list(trackers)) for _ in range(3))
            shown = " / ".join(f"{value:.3f}" for value in found)
            print(f"log_every {every:>2}, trackers {trackers}: {shown} ms a step")


if __name__ == "__main__":
    main()
