"""Cost of a committed checkpoint beyond writing the same bytes: 500 MB of weights and moments.

    python -m tests.benchmarks.bench_save [--megabytes 500] [--repeats 5] [--folder DIR]

In turn, in one folder and in random order: `plain` only writes the same two safetensors files;
`flushed` also puts each on disk (fsync), like a save without a commit protocol; `committed` is the
save of a run: values checked, written, flushed, digested, manifest, renamed; `undigested` is the
same save without check and digest, to show their cost. `beyond` is committed minus each of the
others, as the median of the differences within a round. The parts are measured within the committed
saves. `held` is the time that training waits under `background_saving`: the copy. Medians (minimum
to maximum).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from modern_llm.distributed.collectives import Peers
from modern_llm.storage import atomic, safetensors_writer
from modern_llm.training.checkpointing import format

WIDTH = 2048
SETTLE_S = 0.3
"""Seconds left to the disk after a flush, because it reports the end too early."""


def make(megabytes: float) -> format.Snapshot:
    """Return weights and two moments of layers of `WIDTH` x `WIDTH` float32 numbers, on the
    host."""
    layers = max(1, round(megabytes * 1e6 / (12 * WIDTH * WIDTH)))
    draw = torch.Generator().manual_seed(0)

    def tensors(*keys: str) -> dict[str, torch.Tensor]:
        return {
            f"{key}layers.{i}.weight": torch.randn(WIDTH, WIDTH, generator=draw)
            for key in keys
            for i in range(layers)
        }

    files = {
        "model.safetensors": tensors(""),
        "optimizer.safetensors": tensors("exp_avg/", "exp_avg_sq/"),
    }
    return format.Snapshot(files, {}, {"step": 1})


def plain(state: format.Snapshot, folder: Path, *, flush: bool) -> None:
    """Write the files of `state`, with a flush of each if `flush`."""
    folder.mkdir()
    for name, tensors in state.tensors.items():
        save_file(tensors, folder / name)
        if flush:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())


def committed(state: format.Snapshot, folder: Path) -> dict[str, float]:
    """Save as a run does; return the seconds of its parts."""
    parts: dict[str, float] = {}

    def timed(name: str, real: Callable) -> Callable:
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - began

        return call

    patches = [
        mock.patch.object(format, "write_tensors", timed("write", format.write_tensors)),
        mock.patch.object(atomic, "seal", timed("flush_and_digest", atomic.seal)),
        mock.patch.object(atomic, "finish", timed("manifest_and_name", atomic.finish)),
    ]
    for patch in patches:
        patch.start()
    try:
        format.commit(Peers(0, 1), folder, 1, lambda: state, {}, {})
    finally:
        for patch in patches:
            patch.stop()
    return parts


class NoDigest:
    """Accepts bytes and computes nothing."""

    def update(self, part: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


def undigested(state: format.Snapshot, folder: Path) -> None:
    """Save as a run does, without checking values and without digests of tensors."""
    with (
        mock.patch.object(safetensors_writer, "_look", lambda name, tensor: None),
        mock.patch.object(safetensors_writer, "new_digest", NoDigest),
    ):
        committed(state, folder)


def copied(state: format.Snapshot) -> list[torch.Tensor]:
    """Copy all tensors, as a background save does before training continues."""
    groups = state.tensors.values()
    return [tensor.to("cpu", copy=True) for group in groups for tensor in group.values()]


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Return the seconds of one call, after earlier writes are on disk, and its result."""
    os.sync()
    time.sleep(SETTLE_S)
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def shown(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    asked = parser.parse_args()
    state = make(asked.megabytes)
    size = sum(t.numel() * 4 for group in state.tensors.values() for t in group.values())
    found: dict[str, list[float]] = {}
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        place = Path(folder) / "place"
        for _ in range(asked.repeats):
            runs = {
                "plain": lambda: plain(state, place, flush=False),
                "flushed": lambda: plain(state, place, flush=True),
                "committed": lambda: committed(state, place),
                "undigested": lambda: undigested(state, place),
                "held": lambda: copied(state),
            }
            # In a new order each time: some calls are slow because of the previous one.
            for name, work in draw.sample(list(runs.items()), len(runs)):
                took, result = seconds(work)
                found.setdefault(name, []).append(took)
                if name == "committed":
                    for part, value in result.items():
                        found.setdefault(f"committed: {part}", []).append(value)
                del result
                shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(report(size, found), indent=1))


def report(size: int, found: dict[str, list[float]]) -> dict[str, object]:
    """Return medians and spread of the seconds in `found`, and what a committed save adds."""
    whole = statistics.median(found["committed"])

    def beyond(other: str) -> float:
        pairs = zip(found["committed"], found[other], strict=True)
        return round(100 * statistics.median(c - o for c, o in pairs) / whole, 2)

    return {
        "megabytes": round(size / 1e6),
        "seconds": {name: shown(values) for name, values in found.items()},
        "beyond_flushed_percent": beyond("flushed"),
        "beyond_undigested_percent": beyond("undigested"),
        "beyond_plain_percent": beyond("plain"),
        "required_percent": "3, beyond flushed and beyond undigested",
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
