"""Cost of the watchdog, the heartbeats and the shared stop flag in a step of 100 ms.

Two processes sleep through steps of 100 ms, so that all processor time is the cost of threads and
heartbeats. The flag is a collective that starts before the optimizer and is collected after it. It
is measured in steps that compute for `OPTIMIZER_S` between the two, after both processes have met:
wall time in the training thread, and processor time of all threads (medians). The share of a step
is wall time, which on a busy machine includes other programs. `flag_at_once` is the same decision
without work between the two. Goal: 0.5 % of a step, 0.5 ms.

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
OPTIMIZER_S = 0.01
PERCENT = 0.5


def measure(folder: Path) -> dict[str, float]:
    """On one rank: return milliseconds of processor and wall time per step, with and without."""
    from modern_llm.config import TrainingConfig
    from modern_llm.distributed.health import heartbeat
    from modern_llm.distributed.health.watchdog import Watchdog
    from modern_llm.distributed.runtime import start
    from modern_llm.distributed.shutdown.consensus import begin_asking, stop_asked
    from modern_llm.distributed.shutdown.signals import StopRequest

    runtime = start(TrainingConfig(run_name="b", output_dir=folder))
    assert runtime.world == 2

    def marks(step: int) -> None:
        for name in ("loading the batch", "forward and backward", "optimizer", "deciding"):
            with heartbeat.quick(name, step):
                heartbeat.tick()
        heartbeat.step_done(STEP_S)

    def compute(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    def flag(between: float) -> tuple[float, float]:
        """Return wall and processor seconds of one decision."""
        stop_asked(runtime)  # waiting for the other process is not counted
        began, used = time.perf_counter(), time.process_time()
        begin_asking(runtime)
        start, at = time.perf_counter(), time.process_time()
        compute(between)
        clock, used = began + time.perf_counter() - start, used + time.process_time() - at
        assert stop_asked(runtime) is None
        return time.perf_counter() - clock, time.process_time() - used

    found = {}
    for name in ("nothing", "threads and marks", "and the stop flag"):
        watched = Watchdog(runtime, lambda: folder, None if name == "nothing" else 60.0)
        with StopRequest(folder / "STOP"), watched:
            runtime.barrier()
            before, costs, at_once = time.process_time(), [], []
            for step in range(STEPS):
                if name == "and the stop flag":
                    compute(STEP_S - OPTIMIZER_S)
                    costs.append(flag(OPTIMIZER_S))
                    at_once.append(flag(0.0))
                else:
                    time.sleep(STEP_S)
                if name != "nothing":
                    marks(step)
            found[name] = 1000 * (time.process_time() - before) / STEPS
    for at, kind in enumerate(("by the clock", "of the processor")):
        found[f"flag {kind}"] = 1000 * statistics.median(cost[at] for cost in costs)
        found[f"flag at once {kind}"] = 1000 * statistics.median(cost[at] for cost in at_once)
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, 2, Path(folder), timeout=300)
    base = max(rank["nothing"] for rank in ranks)
    watch = max(rank["threads and marks"] for rank in ranks) - base
    flags = {
        f"{name}_{kind}_ms".replace(" ", "_"): max(rank[f"{name} {kind}"] for rank in ranks)
        for name in ("flag", "flag at once")
        for kind in ("by the clock", "of the processor")
    }
    percent = 100 * (watch + flags["flag_by_the_clock_ms"]) / (1000 * STEP_S)
    result = {
        "threads_and_marks_ms": round(watch, 4),
        **{name: round(value, 4) for name, value in flags.items()},
        "percent_of_a_100_ms_step": round(percent, 3),
        "aimed_at_percent": PERCENT,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
