"""Checkpoint format: weights and optimizer moments as safetensors in a committed folder.

Data order, learning rate and random draws are functions of the step, so a checkpoint needs no more
than tensors and one integer. Nothing is pickled. Under ZeRO every rank writes its pieces and reads
those that it needs, so that a run resumes under another stage or number of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modern_llm.config.errors import StorageError
from modern_llm.distributed.collectives import Peers
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.optimizer_shards import MOMENTS, base_optimizer, pieces, replicated
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.run_checkpoint import STATE, WEIGHTS, Shards, buffers, newest, whole_shape
from modern_llm.storage.atomic import TEMPORARY, verified_manifest
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.safetensors_writer import write_tensors
from modern_llm.training.guards.state import GuardState

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer"
NOTHING: Mapping[str, Mapping[str, Tensor]] = {}


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint; `tensors` is empty if another rank writes everything."""

    tensors: dict[str, dict[str, Tensor]]
    """File -> name -> tensor."""
    starts: dict[str, int]
    """Parameter -> first element of this rank's piece."""
    state: dict[str, Any] | None
    """Content of `state.json`, on rank 0 only."""


def save(
    runtime: Runtime,
    folder: Path,
    step: int,
    engine: Engine,
    guards: GuardState,
    facts: dict[str, Any],
    files: dict[str, bytes],
    more: Mapping[str, Mapping[str, Tensor]] = NOTHING,
) -> None:
    """Commit `folder/step-XXXXXXXX` with the state after optimizer step `step`; a collective.

    Args:
        facts: written into the manifest.
        files: path -> content of what makes the folder a model: configuration and tokenizer.
        more: see `snapshot`.
    """
    taken = partial(snapshot, runtime, step, engine, guards, more)
    commit(runtime, folder, step, taken, facts, files)


def commit(
    peers: Peers,
    folder: Path,
    step: int,
    taken: Callable[[], Snapshot],
    facts: dict[str, Any],
    files: dict[str, bytes],
) -> None:
    """Commit `folder/step-XXXXXXXX` with the snapshots that `taken` returns; a collective."""
    target = folder / f"step-{step:08d}"
    with peers.committed_folder(target, {**facts, "step": step}) as temporary:
        mine = taken()
        if mine.state is not None:
            with around("state.write"):
                (temporary / STATE).write_text(json.dumps(mine.state))
            for name, content in files.items():
                path = temporary / name
                path.parent.mkdir(exist_ok=True)
                with around("files.write"):
                    path.write_bytes(content)
        starts = {"format": "pt", "starts": json.dumps(mine.starts)}
        # In parallel: one file is digested while the other waits for the disk.
        name = threading.current_thread().name
        with ThreadPoolExecutor(2, name, heartbeat.helper()) as pool:
            tensors = mine.tensors.items()
            parts = [pool.submit(write_tensors, temporary / n, t, starts) for n, t in tensors]
            for part in parts:
                part.result()
                heartbeat.tick()


def snapshot(
    runtime: Runtime,
    step: int,
    engine: Engine,
    guards: GuardState,
    more: Mapping[str, Mapping[str, Tensor]] = NOTHING,
    *,
    copied: bool = False,
) -> Snapshot:
    """Return this rank's share of the state after optimizer step `step`.

    Args:
        more: kind of file -> parameter -> piece, on the host and never changed in place.
        copied: copy to host memory, so that training can continue; else the snapshot may share
            tensors that the next step changes.
    """
    whole = replicated(engine)
    if whole and not runtime.is_main:
        return Snapshot({}, {}, None)
    mine = pieces(engine)
    optimizer = base_optimizer(engine)
    shapes = {n: p.shape for n, p in engine.inner.named_parameters()}
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for piece in mine:
        count = piece.count(optimizer)
        if count is not None:
            moments[f"step/{piece.name}"] = count
        size, shape = piece.data.numel(), shapes[piece.name]
        for key, tensor in {None: piece.weight, **piece.moments(optimizer)}.items():
            tensor = tensor.view(shape) if whole and tensor.numel() == size else tensor
            # Pieces are views of one buffer, and a table of codes belongs to many parameters:
            # safetensors refuses both.
            if copied or not whole or tensor.numel() < size:
                tensor = tensor.to("cpu", copy=True)
            if key is None:
                weights[piece.name] = tensor
            else:
                moments[f"{key}/{piece.name}"] = tensor
    state = None
    if runtime.is_main:
        kept = buffers(engine.inner)
        weights |= {n: b.to("cpu", copy=True) for n, b in kept.items()} if copied else kept
        state = {"step": step, "scaler": engine.scaler_state(), **guards.saved()}
    ending = ".safetensors" if whole else f"-{runtime.rank:05d}.safetensors"
    files = {f"{WEIGHTS}{ending}": weights, f"{OPTIMIZER}{ending}": moments}
    for kind, tensors in more.items():
        files[f"{kind}{ending}"] = {
            n: t.view(shapes[n]) if whole else t for n, t in tensors.items()
        }
    return Snapshot(files, {piece.name: piece.start for piece in mine}, state)


def find(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact checkpoint, and remove leftovers of killed saves."""
    remove_leftovers(folder)
    return newest(folder)


def load_state(checkpoint: Path, engine: Engine, guards: GuardState) -> None:
    """Load this rank's optimizer state and the guards' state; call it after `load_weights`."""
    optimizer = base_optimizer(engine)
    stored, weights = Shards(checkpoint, OPTIMIZER), Shards(checkpoint, WEIGHTS)
    parameters = dict(engine.inner.named_parameters())
    saved = stored.keys_of()
    for piece in pieces(engine):
        heartbeat.tick()
        end = piece.start + piece.data.numel()
        shape = whole_shape(parameters[piece.name])
        # Under bfloat16 DeepSpeed made its float32 weights from rounded ones: read them again.
        piece.set_weight(weights.read(piece.name, piece.start, end, shape, piece.dtype))
        keys = saved.get(piece.name, set())
        if not keys:
            continue  # the parameter never had a gradient, so the optimizer has no state for it
        if not keys <= {"step", *MOMENTS}:
            heartbeat.tick()
            piece.restore(optimizer, {k: stored.as_written(f"{k}/{piece.name}") for k in keys})
            continue
        count = stored.read(f"step/{piece.name}", 0, 1, torch.Size(()), torch.float32)
        piece.make_moments(optimizer, float(count))
        for key, moment in piece.moments(optimizer).items():
            heartbeat.tick()
            part = stored.read(f"{key}/{piece.name}", piece.start, end, shape, moment.dtype)
            moment.copy_(part)
    try:
        state = json.loads(read_text(checkpoint / STATE))
        guards.load(state)
        scaler = state["scaler"]
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        reason = type(error).__name__
        raise StorageError(f"{checkpoint / STATE}: cannot be read ({reason})") from error
    engine.load_scaler_state(scaler)


def retire(folder: Path, keep: int, good: set[str], spared: Collection[str] = ()) -> None:
    """Remove checkpoints older than the newest `keep` intact ones; a failure to remove is ignored.

    Args:
        good: names of checkpoints known to be intact, updated. Others are verified first; a damaged
            one does not count towards `keep`.
        spared: names that are kept in any case, and do not count unless they are the newest.
    """
    kept = 0
    for path in sorted(folder.glob("step-*"), reverse=True):
        if kept < keep:
            kept += path.name in good or _verifies(path, good)
            continue
        if path.name in spared:
            continue
        with around("retire"):
            shutil.rmtree(path, ignore_errors=True)
        good.discard(path.name)


def _verifies(checkpoint: Path, good: set[str]) -> bool:
    try:
        verified_manifest(checkpoint)
    except (StorageError, OSError):
        return False
    good.add(checkpoint.name)
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left behind; only safe while holding the run's lock."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
