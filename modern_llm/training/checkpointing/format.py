"""Weights and optimizer moments as safetensors in a committed folder; the newest that verifies
counts.

Holds everything that a run needs to go on: order, rate and random draws are functions of the step,
so the position is one integer. Nothing is pickled. Under ZeRO every rank writes the pieces that it
holds and reads those that it needs, so that a run goes on under another stage or on another number
of processes.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modern_llm.config.errors import StorageError
from modern_llm.distributed.collectives import Peers
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.optimizer_shards import MOMENTS, base_optimizer, pieces, replicated
from modern_llm.distributed.runtime import Runtime
from modern_llm.storage.atomic import TEMPORARY, verified_manifest
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import check_regular, read_text
from modern_llm.storage.safetensors_writer import NAMES, write_tensors
from modern_llm.training.guards.state import GuardState

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, STATE = "model", "optimizer", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a checkpoint; `tensors` is empty where another rank writes all."""

    tensors: dict[str, dict[str, Tensor]]
    """File -> name -> tensor."""
    starts: dict[str, int]
    """Parameter -> the element at which this rank's piece of it begins."""
    state: dict[str, Any] | None
    """What rank 0 writes besides."""


def save(
    runtime: Runtime,
    folder: Path,
    step: int,
    engine: Engine,
    guards: GuardState,
    facts: dict[str, Any],
) -> None:
    """Commit `folder/step-XXXXXXXX` with the state after optimizer step `step`; a collective."""
    commit(runtime, folder, step, lambda: snapshot(runtime, step, engine, guards), facts)


def commit(
    peers: Peers, folder: Path, step: int, taken: Callable[[], Snapshot], facts: dict[str, Any]
) -> None:
    """Commit `folder/step-XXXXXXXX` with what `taken` returns on each rank; a collective."""
    target = folder / f"step-{step:08d}"
    with peers.committed_folder(target, {**facts, "step": step}) as place:
        mine = taken()
        if mine.state is not None:
            with around("state.write"):
                (place / STATE).write_text(json.dumps(mine.state))
        starts = {"starts": json.dumps(mine.starts)}
        # Side by side: digests and looks at one file while the other one waits for the disk.
        name = threading.current_thread().name
        with ThreadPoolExecutor(2, name, heartbeat.helper()) as pool:
            files = mine.tensors.items()
            parts = [pool.submit(write_tensors, place / n, t, starts) for n, t in files]
            for part in parts:
                part.result()
                heartbeat.tick()


def snapshot(
    runtime: Runtime, step: int, engine: Engine, guards: GuardState, *, copied: bool = False
) -> Snapshot:
    """Return this rank's share of the state after optimizer step `step`.

    Args:
        copied: into the host's memory, so that training may go on; else tensors may be those that
            the next step changes.
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
        count = optimizer.state.get(piece.owner, {}).get("step")
        if count is not None:
            moments[f"step/{piece.name}"] = torch.tensor(float(count))
        parts = {key: piece.moment(optimizer, key) for key in MOMENTS}
        for key, tensor in {None: piece.weight, **parts}.items():
            if tensor is None:
                continue
            tensor = tensor.view(shapes[piece.name]) if whole else tensor
            if copied or not whole:  # pieces are views into one buffer: safetensors refuses them
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
    return Snapshot(files, {piece.name: piece.start for piece in mine}, state)


def find(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact checkpoint, and clear away what killed saves have left."""
    remove_leftovers(folder)
    return newest(folder)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that verifies and its facts, or None where there is none at all.

    Raises:
        StorageError: checkpoints stand here and none is intact; the run must not start over by
        itself.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for place in found:
        try:
            return place, verified_manifest(place)
        except (StorageError, OSError) as error:  # OSError: the disk cannot read it (EIO)
            log.warning("checkpoint %s is damaged and skipped: %s", place.name, error)
    if found:
        raise StorageError(
            f"{folder}: none of {len(found)} checkpoints is intact; remove them to start over"
        )
    return None


def load_weights(place: Path, model: nn.Module) -> None:
    """Read the weights of a checkpoint that `newest` verified into a `model` not yet prepared."""
    stored = Shards(place, WEIGHTS)
    into = {n: p.data for n, p in model.named_parameters() if p.requires_grad} | buffers(model)
    if stored.names() != set(into):
        raise StorageError(
            f"{place}: holds other tensors than the model: {sorted(stored.names() ^ set(into))[:4]}"
        )
    for name, tensor in into.items():
        whole = stored.read(name, 0, tensor.numel(), _shape(tensor), tensor.dtype)
        tensor.copy_(whole.view_as(tensor))
        heartbeat.tick()


def load_state(place: Path, engine: Engine, guards: GuardState) -> None:
    """Read this rank's share of the optimizer's state, and the guards', after `load_weights`."""
    optimizer = base_optimizer(engine)
    stored, weights = Shards(place, OPTIMIZER), Shards(place, WEIGHTS)
    parameters = dict(engine.inner.named_parameters())
    for piece in pieces(engine):
        heartbeat.tick()
        end = piece.start + piece.weight.numel()
        shape, dtype = _shape(parameters[piece.name]), piece.weight.dtype
        # Under bfloat16 the weights that were given to DeepSpeed have lost bits by now.
        piece.weight.copy_(weights.read(piece.name, piece.start, end, shape, dtype))
        if f"step/{piece.name}" not in stored.names():
            continue  # it never had a gradient: AdamW keeps nothing for such a parameter
        count = stored.read(f"step/{piece.name}", 0, 1, torch.Size(()), torch.float32)
        piece.make_moments(optimizer, float(count))
        for key in MOMENTS:
            moment = piece.moment(optimizer, key)
            heartbeat.tick()
            part = stored.read(f"{key}/{piece.name}", piece.start, end, shape, moment.dtype)
            moment.copy_(part)
    try:
        state = json.loads(read_text(place / STATE))
        guards.load(state)
        scaler = state["scaler"]
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise StorageError(f"{place / STATE}: cannot be read ({type(error).__name__})") from error
    engine.load_scaler_state(scaler)


def retire(folder: Path, keep: int, good: set[str]) -> None:
    """Remove all but the newest `keep` checkpoints that verify; never fails a run.

    Args:
        good: names of those that were written or verified by this process; others are verified
            here, and those that are damaged count for nothing and are left to be looked at.
    """
    kept = 0
    for place in sorted(folder.glob("step-*"), reverse=True):
        if kept < keep:
            kept += place.name in good or _verifies(place, good)
            continue
        with around("retire"):
            shutil.rmtree(place, ignore_errors=True)
        good.discard(place.name)


def _verifies(place: Path, good: set[str]) -> bool:
    try:
        verified_manifest(place)
    except (StorageError, OSError):
        return False
    good.add(place.name)
    return True


def remove_leftovers(folder: Path) -> None:
    """Remove what killed saves left behind; called by who holds the run's lock alone."""
    for place in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(place, ignore_errors=True)


def _shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a whole parameter, also where this rank holds a part of it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong to the state."""
    persistent = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


class _Part(NamedTuple):
    """One stored tensor, or the piece of it that one rank wrote."""

    start: int
    """First element, counted in the flattened whole."""
    stop: int
    file: Any
    shape: torch.Size
    dtype: str
    """As safetensors names it."""
    whole: bool
    """Whether it is no piece, so that its shape is the tensor's own."""


class Shards:
    """Tensors that lie in one file, or in pieces in the files of many ranks."""

    def __init__(self, place: Path, kind: str):
        self._place = place
        self._parts: dict[str, list[_Part]] = {}
        try:
            for path in sorted(place.glob(f"{kind}*.safetensors")):
                check_regular(path)
                self._index(safe_open(path, framework="pt"), whole=path.stem == kind)
        except (SafetensorError, OSError, ValueError) as error:
            raise StorageError(f"{place}: {kind} cannot be read ({error})") from error

    def _index(self, file: Any, *, whole: bool) -> None:
        starts = json.loads((file.metadata() or {}).get("starts", "{}"))
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            shape = torch.Size(part.get_shape())
            # Of the count of steps, a scalar, each rank that holds a piece writes the whole.
            start = starts.get(key.rpartition("/")[2], 0) if shape else 0
            found = _Part(start, start + shape.numel(), file, shape, part.get_dtype(), whole)
            self._parts.setdefault(key, []).append(found)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._parts)

    def read(
        self, name: str, start: int, end: int, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor:
        """Return elements `start` to `end` of a flattened tensor.

        Args:
            shape: of the whole tensor that takes them.
            dtype: of that tensor.

        Raises:
            StorageError: it is not there, not whole, or of another shape or dtype.
        """
        parts = sorted(self._parts.get(name, []), key=lambda part: part.start)
        self._must_fit(name, parts, shape, dtype)
        found = []
        at = start
        for part in parts:
            if part.start <= at < min(part.stop, end):
                stop = min(part.stop, end)
                found.append(self._elements(part.file, name, at - part.start, stop - part.start))
                at = stop
        if at != end:
            raise StorageError(f"{self._place}: elements {at} to {end} of {name} are missing")
        return torch.cat(found) if len(found) > 1 else found[0]

    def _must_fit(
        self, name: str, parts: list[_Part], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        """Refuse a tensor of another shape or dtype than the one that takes its values."""
        kind = NAMES[str(dtype).removeprefix("torch.")]
        expected = f"{kind} {tuple(shape)}"
        if not parts:
            raise StorageError(f"{self._place}: {name} is missing, expected {expected}")
        for part in parts:
            # Of pieces that ranks wrote only the number of elements is known.
            fits = part.shape == shape or (not part.whole and len(part.shape) == 1)
            if not fits or part.dtype != kind:
                raise StorageError(
                    f"{self._place}: {name} is {part.dtype} {tuple(part.shape)}, expected "
                    f"{expected}: it is another model's, or was written by other code; remove "
                    "this checkpoint to resume from an older one"
                )
        size = max(part.stop for part in parts)
        if size != shape.numel():
            raise StorageError(f"{self._place}: {name} is {size} elements, expected {expected}")

    @staticmethod
    def _elements(file: Any, name: str, start: int, stop: int) -> Tensor:
        part = file.get_slice(name)
        if len(part.get_shape()) == 1:
            return part[start:stop]
        return file.get_tensor(name).view(-1)[start:stop]
