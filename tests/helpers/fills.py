"""Fills of a reference store in processes of their own, which log every answer that they score.

A log is a file of 16-byte keys, appended as they are scored, so that the work of a killed process
is known to the last forward.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers

from modern_llm.config import TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.runtime import Runtime, start
from modern_llm.models.load import inspect_checkpoint
from modern_llm.reference.fill import fill
from modern_llm.reference.reference_pass import ReferencePass
from modern_llm.reference.scoring import Scoring
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.layout import Identity
from modern_llm.reference.store.shard import Shard
from modern_llm.reference.store.store import ReferenceStore

IDENTITY = Identity("5eed" * 16, '{"compute": "float32", "scoring": 0}')


def numbered_key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def scripted(keys: np.ndarray, *, tokens: bool) -> Entries:
    """Return made-up entries: a function of the key alone, of unequal lengths, zero included."""
    keys = np.asarray(keys, "S16")
    raw = np.frombuffer(np.ascontiguousarray(keys).tobytes(), "<u4").reshape(-1, 4)
    counts = (raw[:, 0] % 7).astype(np.int32)
    ends = np.cumsum(counts)
    owner = np.repeat(np.arange(len(keys)), counts)
    inside = np.arange(len(owner)) - np.repeat(ends - counts, counts)
    values = -((raw[owner, 1] + 97 * inside) % 100_003).astype(np.float32) / 1000
    sums = np.bincount(owner, values, minlength=len(keys)).astype(np.float32)
    return Entries(keys, sums, counts, values if tokens else None)


def expect_equal(found: Entries, expected: Entries) -> None:
    """Compare byte by byte; both in the order of their keys."""
    for name in ("keys", "sums", "counts", "tokens"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        assert one is None or one.tobytes() == other.tobytes(), name


class KeyLog:
    """Keys in a file, in the order in which any process scored them."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)

    def add(self, keys: np.ndarray) -> None:
        os.write(self._descriptor, keys.tobytes())


def read_log(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes() if path.exists() else b"", "S16")


def check_shards(folder: Path, identity: Identity) -> int:
    """Open and verify, byte by byte, every file under a final name; return the number of shards.

    By the reader alone: a store would set a damaged one aside and continue.
    """
    found = 0
    for path in folder.glob("shard-*"):
        try:
            shard = Shard(path, identity)
            shard.verify()
        except FileNotFoundError:  # compacted meanwhile
            continue
        found += 1
    assert not list(folder.glob("damaged-*"))
    return found


def fill_pairs(checkpoint: Path, table: Path, cache: Path, log: Path, flush_every: int) -> None:
    """Fill the store of a checkpoint by the reference pass, on all processes of the group.

    Creates `<log>.<rank>` when the group has formed.
    """
    os.environ["MODERN_LLM_CACHE"] = str(cache)
    # A bar's lock is a named semaphore, which a killed process leaves behind.
    transformers.utils.logging.disable_progress_bar()
    log_of_keys = KeyLog(log)
    score, fill_one, filling = Scoring.__call__, ReferencePass.fill, [False]

    def noted(self, trees, groups):
        for found in score(self, trees, groups):
            if filling[0]:  # the check at the end scores a sample again
                for _, values in found:
                    log_of_keys.add(values.keys)
            yield found

    def fill_noted(self, *arguments):
        filling[0] = True
        report = fill_one(self, *arguments)
        filling[0] = False
        return report

    Scoring.__call__, ReferencePass.fill = noted, fill_noted
    config = TrainingConfig(
        run_name="storm", output_dir=cache / "run", tokens_per_micro_batch=200, batch_size=4
    )
    runtime = start(config)
    assert runtime.world == int(os.environ["WORLD_SIZE"])
    (log.parent / f"{log.name}.{runtime.rank}").touch()
    dpo = DPOConfig(max_length=96, flush_every=flush_every, keep_token_logprobs=True)
    found = inspect_checkpoint(checkpoint)
    reference = ReferencePass(runtime, found, config, dpo)
    reference.register(training_pairs=TokenTable.open(table))
    runtime.on_main(reference.check_store)
    reference.fill_all()


class Numbered:
    """Answers without a text."""

    def __init__(self, count: int):
        self.keys = np.unique(np.array([numbered_key(i) for i in range(count)], "S16"))

    def __len__(self) -> int:
        return len(self.keys)

    def origin(self, entry: int) -> str:
        return f"made up:{entry + 1}"


class Alone:
    """Answers laid out `size` to a forward."""

    def __init__(self, chosen: np.ndarray, size: int):
        self._chosen = chosen
        self._groups = [
            np.arange(a, min(a + size, len(chosen))) for a in range(0, len(chosen), size)
        ]

    def groups(self) -> list[np.ndarray]:
        return self._groups

    def entries(self, group: np.ndarray) -> np.ndarray:
        return self._chosen[group]


class Scripted:
    """Scores four answers per forward, or each alone, and logs which."""

    tokens = True

    def __init__(self, log: Path, pause: float):
        self._log, self._pause = KeyLog(log), pause

    def lay_out(
        self, answers: Numbered, entries: np.ndarray | None = None, *, alone: bool = False
    ) -> Alone:
        self._keys = answers.keys
        chosen = np.arange(len(answers)) if entries is None else entries
        return Alone(chosen, 1 if alone else 4)

    def __call__(
        self, trees: Alone, groups: Iterable[np.ndarray]
    ) -> Iterator[list[tuple[np.ndarray, Entries]]]:
        for group in groups:
            time.sleep(self._pause)
            entries = trees.entries(group)
            self._log.add(self._keys[entries])
            yield [(entries, scripted(self._keys[entries], tokens=True))]


def fill_numbered(folder: Path, log: Path, count: int, flush_every: int, pause: float) -> None:
    """Fill a store with scripted values, as one of several jobs that do not know of each other.

    Args:
        pause: seconds that a forward of four answers takes.
    """
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    fill(
        Runtime(alone, TrainingConfig(run_name="alone", output_dir=folder)),
        Numbered(count),
        ReferenceStore(folder, IDENTITY),
        Scripted(log, pause),
        flush_every=flush_every,
    )
