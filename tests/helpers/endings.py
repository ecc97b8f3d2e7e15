"""Pairs of processes that work together and end through Python's own exit: how did they end?

    python -m tests.helpers.endings FOLDER WAY KIND COUNT [starved]

WAY is `script` (the user's own, which calls `run_dpo`) or `command` (`python -m modern_llm`); KIND
is `groups` (no run, only its process groups), or a run under `ddp` or `zero2`, with `-background`
for background saving. Processes are forked from one that has imported everything; from the export
on they run at idle scheduling priority. Under `starved` they keep the usual one, but gloo's workers
of rank 1 are kept from the processor between the last collective and the last exit handler, which
makes a rare abort a frequent one. The last line printed is a JSON list of [pair, rank, status] of
those that did not end with 0.
"""

# ruff: noqa: E402

from __future__ import annotations

import atexit
import ctypes
import os
import sys

# Registered before anything else, so that they run last: from the second one on nothing gives the
# interpreter to a thread that waits for it.
atexit.register(ctypes.PyDLL(None).usleep, 60_000)
atexit.register(lambda: _feed())

import json
import runpy
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from modern_llm import cli  # noqa: F401, imported before the forks
from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.distributed import runtime
from modern_llm.distributed.collectives import Peers, own_group
from modern_llm.training import stage as setup
from modern_llm.training import train_dpo
from modern_llm.training.run import outcome
from tests.helpers.ranks import _announce, _free_port
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

PAIRS = 3
"""At work at a time."""
WORKER = "pt_gloo_runloop"
_starved: list[int] = []
_spinner = 0


def _starve() -> None:
    """Keep gloo's workers from the processor whenever a broadcast has returned.

    They share one with this thread, which comes first (where that is allowed), so that they lose
    it when they wake this thread; and with a process that never sleeps.
    """
    global _spinner
    processor, parent = {max(os.sched_getaffinity(0))}, os.getpid()
    _spinner = os.fork()
    if _spinner == 0:
        os.sched_setaffinity(0, processor)
        until = time.monotonic() + 60
        while os.getppid() == parent and time.monotonic() < until:
            pass
        os._exit(0)
    for thread in map(int, os.listdir("/proc/self/task")):
        try:
            name = Path(f"/proc/self/task/{thread}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # this thread has ended since, as one that saved in the background may
        if name == WORKER:
            _starved.append(thread)
        if name == WORKER or thread == parent:
            os.sched_setaffinity(thread, processor)
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    real = Peers.from_main

    def from_main(peers: Peers, value: Any) -> Any:
        _schedule(os.SCHED_OTHER, _starved)
        result = real(peers, value)
        _schedule(os.SCHED_IDLE, _starved)
        return result

    Peers.from_main = from_main


def _schedule(policy: int, threads: Iterable[int]) -> None:
    for thread in threads:
        with suppress(OSError):  # it has ended
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def _feed() -> None:
    _schedule(os.SCHED_OTHER, _starved)
    others = os.sched_getaffinity(os.getppid()) - os.sched_getaffinity(0)
    for thread in _starved if others else []:
        with suppress(OSError):
            os.sched_setaffinity(thread, others)
    if _spinner:
        os.kill(_spinner, signal.SIGKILL)  # not waited for: that would give the interpreter away


def _groups(folder: Path, starved: bool) -> None:
    config = TrainingConfig(run_name="x", output_dir=folder, batch_size=4, max_steps=1)
    here = runtime.start(config)
    assert here.world == 2
    peers = Peers(here.rank, here.world, own_group("saving"))
    assert peers.gather(here.rank) == [0, 1]
    if starved and here.rank == 1:
        _starve()
    peers.from_main({"the": "last"})


def _run(folder: Path, way: str, settings: dict[str, Any], starved: bool) -> None:
    outcome.write_report = lambda run: None  # drawings take longer than the run
    real = setup.export

    def export(here: Any, *args: Any) -> Any:
        if starved and here.rank == 1:
            _starve()
        if not starved:  # from here on: what comes before would take minutes
            _schedule(os.SCHED_IDLE, map(int, os.listdir("/proc/self/task")))
        return real(here, *args)

    setup.export = export
    if way == "command":
        file = folder / f"{os.environ['RANK']}.yaml"
        file.write_text(yaml.safe_dump(settings))
        sys.argv = ["modern_llm", "dpo", "--config", str(file)]
        runpy.run_module("modern_llm", run_name="__main__")
    train = settings["train"] | {"output_dir": Path(settings["train"]["output_dir"])}
    train_dpo.run_dpo(
        settings["sft_checkpoint"],
        TrainingConfig(**train),
        train_dpo.DPOConfig(**settings["dpo"]),
        PreferenceDatasetConfig(**settings["data"]),
    )


def _process(
    folder: Path, number: int, rank: int, port: int, way: str, kind: str, starved: bool
) -> NoReturn:
    """One of a pair, to its end by `sys.exit`."""
    place = folder / str(number)
    place.mkdir(exist_ok=True)
    log = os.open(place / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _announce(rank, 2, port)
    os.environ["MODERN_LLM_CACHE"] = str(place / "cache")
    use_deepspeed(stage(2) if "zero2" in kind else None, folder)
    if kind == "groups":
        _groups(place, starved)
    else:
        settings = {
            "sft_checkpoint": str(folder / "model"),
            "train": {
                "run_name": "x", "output_dir": str(place / "run"), "batch_size": 4, "max_steps": 2,
                "learning_rate": 1e-3, "log_every": 1, "tokens_per_micro_batch": 300,
                "save_every": 1, "background_saving": "background" in kind,
            },
            "dpo": {"max_length": 64},
            "data": {"dataset_name": str(folder / "pairs.jsonl")},
        }  # fmt: skip
        _run(place, way, settings, starved)
        assert (place / "run" / "x_final" / "model.safetensors").is_file()
    sys.exit(0)


def _inputs(folder: Path) -> None:
    """Write them in a process of its own: this one must have no threads when it forks."""
    pid = os.fork()
    if pid == 0:
        tokenizer = make_tokenizer(folder / "tokenizer")
        make_checkpoint(folder / "model", tokenizer, n_layers=1, d_model=16, n_heads=2)
        write_jsonl(folder / "pairs.jsonl", transcripts(12))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def main(place: str, way: str, kind: str, count: str, *options: str) -> None:
    """Run all pairs and print which processes did not end well."""
    folder, starved = Path(place), "starved" in options
    torch.set_num_threads(1)
    if kind != "groups":
        _inputs(folder)
    running: dict[int, tuple[int, int]] = {}
    begun, bad = 0, []
    while begun < int(count) or running:
        while begun < int(count) and len(running) < 2 * PAIRS:
            port = _free_port()
            for rank in range(2):
                pid = os.fork()
                if pid == 0:
                    _process(folder, begun, rank, port, way, kind, starved)
                running[pid] = begun, rank
            begun += 1
        pid, status = os.wait()
        if pid in running:
            number, rank = running.pop(pid)
            if status:
                bad.append([number, rank, os.waitstatus_to_exitcode(status)])
    print(json.dumps(bad), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
