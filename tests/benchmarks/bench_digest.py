"""The digest of a reference's weights, compared with reading the same file.

    python tests/benchmarks/bench_digest.py [--gigabytes 1] [--repeats 3]

Creates a Llama of about that size in a temporary folder. For the column "from the disk" the system
is asked to drop the file's pages first (posix_fadvise); some file systems ignore that, and both
columns are then equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from modern_llm.models.checkpoint_tensors import stored_tensors, weight_files
from modern_llm.models.load import Checkpoint
from modern_llm.reference import weights_digest
from modern_llm.storage import file_digests


def make(folder: Path, gigabytes: float) -> Checkpoint:
    """Write weights of about the given size, without holding them all in memory."""
    config = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    count = max(1, round(gigabytes * 1e9 / (4 * 4096 * 4096)))
    tensors = {
        f"model.layers.{i}.weight": torch.randn(4096, 4096, generator=generator)
        for i in range(count)
    }
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(str(folder), config, has_tokenizer=False)


def read(files: list[Path]) -> None:
    """Read the files and discard the bytes."""
    buffer = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: list[Path]) -> None:
    """Ask the system to drop the files' pages."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        checkpoint = make(Path(place) / "model", options.gigabytes)
        files = weight_files(checkpoint)
        size = sum(path.stat().st_size for path in files) / 1e9
        memory = Path(place) / "memory"
        file_digests.SETTLED_S = 0.0

        def once() -> str:
            return weights_digest.digest_of(stored_tensors(checkpoint, files))

        rows: dict[str, list[float]] = {}
        for _ in range(options.repeats):
            for name, work in (("reading", lambda: read(files)), ("digest", once)):
                drop(files)
                rows.setdefault(f"{name}, from the disk", []).append(timed(work))
                rows.setdefault(f"{name}, from memory", []).append(timed(work))
        weights_digest.remembered_digest(
            files, lambda: stored_tensors(checkpoint, files), memory, ""
        )
        again = timed(lambda: weights_digest.remembered_digest(files, lambda: [], memory, ""))
        print(f"{size:.2f} GB of weights, {options.repeats} times, median")
        for name, seconds in rows.items():
            middle = statistics.median(seconds)
            print(f"{name:24} {middle:7.3f} s  {size / middle:6.2f} GB/s")
        print(f"{'digest, remembered':24} {again:7.5f} s")


if __name__ == "__main__":
    main()
