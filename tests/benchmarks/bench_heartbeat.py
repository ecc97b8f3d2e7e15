"""What the watchdog, the marks of progress and the shared stop flag cost in a step of 100 ms.

Two processes sleep through steps of 100 ms, so that all processor time that they use is the cost of
threads and marks. The flag is a collective, measured after steps of computing when both have met:
by its processor time and by the clock (medians); the share of a step is by the clock, on a busy
machine partly others'. Aimed at: 0.5 % of a step, 0.5 ms.

Run: `python -m tests.benchmarks.bench_heartbeat`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from tests.helpers.ranks import run_ranks

STEPS, STEP_S = 100, 0.1
PERCENT = 0.5


def measure(folder: Path) -> dict[str, float]:
    """On one rank: milliseconds of processor and wall time a step, with and without."""
    from modern_llm.config import TrainingConfig
    from modern_llm.distributed import progress
    from modern_llm.distributed.runtime import start
    from modern_llm.distributed.signals import StopRequest
    from modern_llm.distributed.stopping import stop_asked
    from modern_llm.distributed.watchdog import Watchdog

    runtime = start(TrainingConfig(run_name="b", output_dir=folder))
    assert runtime.world == 2

    def marks(step: int) -> None:
        for phase in ("loading the batch", "forward and backward", "optimizer"):
            progress.enter(phase, step)
        progress.tick()
        progress.step_done(STEP_S, STEP_S)

    found = {}
    for name in ("nothing", "threads and marks", "and the stop flag"):
        watched = Watchdog(runtime, folder, None if name == "nothing" else 60.0)
        with StopRequest(folder / "STOP"), watched:
            runtime.barrier()
            before, in_flag, waited = time.process_time(), [0.0], [0.0]
            for step in range(STEPS):
                if name == "and the stop flag":
                    end = time.perf_counter() + STEP_S
                    while time.perf_counter() < end:
                        pass
                else:
                    time.sleep(STEP_S)
                if name != "nothing":
                    marks(step)
                if name == "and the stop flag":
                    stop_asked(runtime)  # waiting for the other is not its cost
                    began, used = time.perf_counter(), time.process_time()
                    assert stop_asked(runtime) is None
                    in_flag.append(time.process_time() - used)
                    waited.append(time.perf_counter() - began)
            found[name] = 1000 * (time.process_time() - before) / STEPS
    found["flag"] = 1000 * statistics.median(in_flag)
    found["flag by the clock"] = 1000 * statistics.median(waited)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, 2, Path(folder), timeout=300)
    base = max(rank["nothing"] for rank in ranks)
    watch = max(rank["threads and marks"] for rank in ranks) - base
    flag, clock = (max(rank[n] for rank in ranks) for n in ("flag", "flag by the clock"))
    percent = 100 * (watch + clock) / (1000 * STEP_S)
    result = {
        "threads_and_marks_ms": round(watch, 4),
        "flag_ms": round(flag, 4),
        "flag_by_the_clock_ms": round(clock, 4),
        "percent_of_a_100_ms_step": round(percent, 3),
        "aimed_at_percent": PERCENT,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
