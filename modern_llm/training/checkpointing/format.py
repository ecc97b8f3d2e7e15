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
) -> None:
    """Commit `folder/step-XXXXXXXX` with the state after optimizer step `step`; a collective."""
    commit(runtime, folder, step, lambda: snapshot(runtime, step, engine, guards), facts)


def commit(
    peers: Peers, folder: Path, step: int, taken: Callable[[], Snapshot], facts: dict[str, Any]
) -> None:
    """Commit `folder/step-XXXXXXXX` with the snapshots that `taken` returns; a collective."""
    target = folder / f"step-{step:08d}"
    with peers.committed_folder(target, {**facts, "step": step}) as temporary:
        mine = taken()
        if mine.state is not None:
            with around("state.write"):
                (temporary / STATE).write_text(json.dumps(mine.state))
        starts = {"starts": json.dumps(mine.starts)}
        # In parallel: one file is digested while the other waits for the disk.
        name = threading.current_thread().name
        with ThreadPoolExecutor(2, name, heartbeat.helper()) as pool:
            files = mine.tensors.items()
            parts = [pool.submit(write_tensors, temporary / n, t, starts) for n, t in files]
            for part in parts:
                part.result()
                heartbeat.tick()


def snapshot(
    runtime: Runtime, step: int, engine: Engine, guards: GuardState, *, copied: bool = False
) -> Snapshot:
    """Return this rank's share of the state after optimizer step `step`.

    Args:
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
        count = optimizer.state.get(piece.owner, {}).get("step")
        if count is not None:
            moments[f"step/{piece.name}"] = torch.tensor(float(count))
        parts = {key: piece.moment(optimizer, key) for key in MOMENTS}
        for key, tensor in {None: piece.weight, **parts}.items():
            if tensor is None:
                continue
            tensor = tensor.view(shapes[piece.name]) if whole else tensor
            if copied or not whole:  # pieces are views of one buffer, which safetensors refuses
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
    """Return the newest intact checkpoint, and remove leftovers of killed saves."""
    remove_leftovers(folder)
    return newest(folder)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest intact checkpoint and its manifest, or None if there is no checkpoint.

    Raises:
        StorageError: none of the checkpoints is intact; the run must not start over silently.
    """
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        try:
            return path, verified_manifest(path)
        except (StorageError, OSError) as error:  # OSError: the disk cannot read it (EIO)
            log.warning("checkpoint %s is damaged and skipped: %s", path.name, error)
    if found:
        raise StorageError(
            f"{folder}: none of {len(found)} checkpoints is intact; remove them to start over"
        )
    return None


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Load the weights of a verified checkpoint into `model`, before it is prepared."""
    stored = Shards(checkpoint, WEIGHTS)
    into = {n: p.data for n, p in model.named_parameters() if p.requires_grad} | buffers(model)
    if stored.names() != set(into):
        different = sorted(stored.names() ^ set(into))[:4]
        raise StorageError(f"{checkpoint}: holds other tensors than the model: {different}")
    for name, tensor in into.items():
        whole = stored.read(name, 0, tensor.numel(), _shape(tensor), tensor.dtype)
        tensor.copy_(whole.view_as(tensor))
        heartbeat.tick()


def load_state(checkpoint: Path, engine: Engine, guards: GuardState) -> None:
    """Load this rank's optimizer state and the guards' state; call it after `load_weights`."""
    optimizer = base_optimizer(engine)
    stored, weights = Shards(checkpoint, OPTIMIZER), Shards(checkpoint, WEIGHTS)
    parameters = dict(engine.inner.named_parameters())
    for piece in pieces(engine):
        heartbeat.tick()
        end = piece.start + piece.weight.numel()
        shape, dtype = _shape(parameters[piece.name]), piece.weight.dtype
        # Under bfloat16 DeepSpeed made its float32 weights from rounded ones: read them again.
        piece.weight.copy_(weights.read(piece.name, piece.start, end, shape, dtype))
        if f"step/{piece.name}" not in stored.names():
            continue  # the parameter never had a gradient, so AdamW has no state for it
        count = stored.read(f"step/{piece.name}", 0, 1, torch.Size(()), torch.float32)
        piece.make_moments(optimizer, float(count))
        for key in MOMENTS:
            moment = piece.moment(optimizer, key)
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


def retire(folder: Path, keep: int, good: set[str]) -> None:
    """Remove checkpoints older than the newest `keep` intact ones; a failure to remove is ignored.

    Args:
        good: names of checkpoints known to be intact, updated. Others are verified first; a damaged
            one does not count towards `keep`.
    """
    kept = 0
    for path in sorted(folder.glob("step-*"), reverse=True):
        if kept < keep:
            kept += path.name in good or _verifies(path, good)
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


def _shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also if this rank holds only a part."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers."""
    persistent = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in persistent}


class _Part(NamedTuple):
    """One stored tensor, or the piece of it that one rank wrote."""

    start: int
    """First element, as an index into the flattened tensor."""
    stop: int
    file: Any
    shape: torch.Size
    dtype: str
    """In the notation of safetensors."""
    whole: bool
    """Whether this is the whole tensor, so that `shape` is its own."""


class Shards:
    """Tensors of a checkpoint, stored in one file or as pieces in one file per rank."""

    def __init__(self, checkpoint: Path, kind: str):
        self._checkpoint = checkpoint
        self._parts: dict[str, list[_Part]] = {}
        try:
            for path in sorted(checkpoint.glob(f"{kind}*.safetensors")):
                check_regular(path)
                self._index(safe_open(path, framework="pt"), whole=path.stem == kind)
        except (SafetensorError, OSError, ValueError) as error:
            raise StorageError(f"{checkpoint}: {kind} cannot be read ({error})") from error

    def _index(self, file: Any, *, whole: bool) -> None:
        starts = json.loads((file.metadata() or {}).get("starts", "{}"))
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            shape = torch.Size(part.get_shape())
            # The step count is a scalar: every rank that holds a piece writes all of it.
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
            shape: of the whole tensor in the model.
            dtype: of the tensor in the model.

        Raises:
            StorageError: the tensor is missing, incomplete, or of another shape or dtype.
        """
        parts = sorted(self._parts.get(name, []), key=lambda part: part.start)
        self._check(name, parts, shape, dtype)
        found = []
        at = start
        for part in parts:
            if part.start <= at < min(part.stop, end):
                stop = min(part.stop, end)
                found.append(self._elements(part.file, name, at - part.start, stop - part.start))
                at = stop
        if at != end:
            raise StorageError(f"{self._checkpoint}: elements {at} to {end} of {name} are missing")
        return torch.cat(found) if len(found) > 1 else found[0]

    def _check(self, name: str, parts: list[_Part], shape: torch.Size, dtype: torch.dtype) -> None:
        """Refuse a tensor whose shape or dtype differs from the model's."""
        kind = NAMES[str(dtype).removeprefix("torch.")]
        expected = f"{kind} {tuple(shape)}"
        if not parts:
            raise StorageError(f"{self._checkpoint}: {name} is missing, expected {expected}")
        for part in parts:
            # Pieces are flat: only their number of elements can be compared.
            fits = part.shape == shape or (not part.whole and len(part.shape) == 1)
            if not fits or part.dtype != kind:
                raise StorageError(
                    f"{self._checkpoint}: {name} is {part.dtype} {tuple(part.shape)}, expected "
                    f"{expected}: the checkpoint is of another model, or was written by other "
                    "code; remove it to resume from an older one"
                )
        size = max(part.stop for part in parts)
        if size != shape.numel():
            raise StorageError(
                f"{self._checkpoint}: {name} has {size} elements, expected {expected}"
            )

    @staticmethod
    def _elements(file: Any, name: str, start: int, stop: int) -> Tensor:
        part = file.get_slice(name)
        if len(part.get_shape()) == 1:
            return part[start:stop]
        return file.get_tensor(name).view(-1)[start:stop]
