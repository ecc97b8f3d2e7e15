"""Weights in a run's checkpoint: whole tensors in one file, or pieces that many ranks wrote.

A run resumes from such a folder, and it is a checkpoint argument like a `transformers` folder: its
configuration and tokenizer are beside the weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from modern_llm.config.errors import StorageError, UserError
from modern_llm.models.head import FusedHead
from modern_llm.storage.atomic import MANIFEST, verified_manifest
from modern_llm.storage.regular_files import check_regular
from modern_llm.storage.safetensors_writer import NAMES

log = logging.getLogger(__name__)

WEIGHTS, STATE = "model", "state.json"
BEST = "best"
"""Manifest entry: the best evaluation so far, with its step."""


def is_run_checkpoint(folder: Path) -> bool:
    """Whether a run saved its state in `folder`."""
    return (folder / MANIFEST).is_file() and (folder / STATE).is_file()


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


def load_weights(
    place: Path, model: nn.Module, tick: Callable[[], None] = lambda: None, prefix: str = ""
) -> None:
    """Read the weights of a verified checkpoint into a `model` that is not prepared yet.

    Args:
        tick: called after each tensor.
        prefix: of the names in `model`, which those in the checkpoint lack.
    """
    stored = Shards(place, WEIGHTS)
    into = {n: p.data for n, p in model.named_parameters() if p.requires_grad} | buffers(model)
    into = {name.removeprefix(prefix): tensor for name, tensor in into.items()}
    if stored.names() != set(into):
        raise StorageError(
            f"{place}: holds other tensors than the model: {sorted(stored.names() ^ set(into))[:4]}"
        )
    parameters = {n.removeprefix(prefix): p for n, p in model.named_parameters()}
    for name, tensor in into.items():
        read = partial(stored.whole, name, whole_shape(tensor), tensor.dtype)
        if hasattr(parameters.get(name), "unread"):  # a placeholder, see `unread`
            parameters[name].unread = read
        else:
            tensor.copy_(read())
        tick()


def checkpoint_folder(place: str | Path) -> str:
    """Return `place`, or the checkpoint that `RUN/last` or `RUN/best` names.

    `last` is the newest intact checkpoint of that run folder. `best` is the one with the best
    evaluation, which the newest one records.

    Raises:
        UserError: the run has saved none, or follows no evaluation.
        StorageError: none that it saved is intact, or the best one is gone.
    """
    path = Path(place)
    saved = path.parent / "checkpoints"
    if path.name not in ("last", "best") or path.exists() or not saved.is_dir():
        return str(place)
    found = newest(saved)
    if found is None:
        finals = sorted(path.parent.glob("*_final"))
        hint = f"; the final model is {finals[0]}" if finals else ""
        raise UserError(f"checkpoint {place}: {saved} holds no checkpoint{hint}")
    folder, manifest = found
    return str(folder if path.name == "last" else _best(place, folder, manifest))


def _best(place: str | Path, folder: Path, manifest: dict[str, Any]) -> Path:
    """Return the checkpoint that this manifest calls the best."""
    best = manifest.get(BEST)
    step = best.get("step") if isinstance(best, dict) else None
    if not isinstance(step, int) or best.get("value") is None:
        raise UserError(
            f"checkpoint {place}: {folder.name} records no best evaluation: the run needs "
            "train.keep_best and evaluation data"
        )
    found = folder.parent / f"step-{step:08d}"
    if not found.is_dir():
        raise StorageError(
            f"checkpoint {place}: {found} is gone; without train.keep_best the best one is "
            f"removed like others: use {folder}"
        )
    return found


def weight_files(folder: Path, kind: str = WEIGHTS) -> list[Path]:
    """Return the files that hold the weights, or another kind of tensors of the run."""
    return sorted(folder.glob(f"{kind}*.safetensors"))


def stored(folder: Path, model: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight, in order of names.

    Args:
        model: one with the same names, on any device, whose shapes pieces of tensors take; without
            it pieces are yielded flat.
    """
    shards = Shards(folder, WEIGHTS)
    shapes = {} if model is None else {n: t.shape for n, t in model.state_dict().items()}
    for name in sorted(shards.names()):
        flat = shards.flat(name)
        yield name, flat.view(shapes[name]) if name in shapes else flat


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a whole parameter, also where this rank holds a part of it."""
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
            for path in weight_files(checkpoint, kind):
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

    def keys_of(self) -> dict[str, set[str]]:
        """Return the first parts of names such as `exp_avg/WEIGHT` by the second."""
        found: dict[str, set[str]] = {}
        for name in self._parts:
            key, _, of = name.rpartition("/")
            found.setdefault(of, set()).add(key)
        return found

    def as_written(self, name: str) -> Tensor:
        """Return a tensor that one rank wrote whole, in its own shape and dtype."""
        return self._parts[name][0].file.get_tensor(name)

    def flat(self, name: str) -> Tensor:
        """Return a whole tensor, flattened, in the dtype of its file."""
        parts = sorted(self._parts[name], key=lambda part: part.start)
        return self._joined(name, parts, 0, max(part.stop for part in parts))

    def whole(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor of this shape and dtype; see `read`."""
        return self.read(name, 0, shape.numel(), shape, dtype).view(shape)

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
        return self._joined(name, parts, start, end)

    def _joined(self, name: str, parts: list[_Part], start: int, end: int) -> Tensor:
        """Return elements `start` to `end` from the sorted parts of a tensor."""
        found, at = [], start
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


def training_rows(model: nn.Module) -> int | None:
    """Return the rows of a chunk with gradients; None before the first forward, or without a fused
    head."""
    head = _head_of(model)
    return None if head is None else head.rows.get(True)


def set_training_rows(model: nn.Module, rows: int) -> None:
    """Use the chunks of an earlier process: of another size they would round differently."""
    head = _head_of(model)
    if head is not None:
        head.rows[True] = rows


def _head_of(model: nn.Module) -> FusedHead | None:
    return next((m for m in model.modules() if isinstance(m, FusedHead)), None)
