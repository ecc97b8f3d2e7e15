"""The tensors in a checkpoint's weight files: names, shapes, types and bytes, without a model.

The digest of a reference is made of them before a model is loaded. Files are mapped, so that a
tensor costs memory only while it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.hub import cached_file

from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import first_line
from modern_llm.models import adapters, pt_checkpoint, run_checkpoint
from modern_llm.models.load import Checkpoint, inspect_checkpoint, parts_of
from modern_llm.models.shapes import empty_model
from modern_llm.storage.regular_files import check_regular

# In the order of preference of transformers.
_LAYOUTS = ("model.safetensors", "pytorch_model.bin")


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the weight files of a checkpoint; for a Hub id those in the Hub's cache.

    Raises:
        UserError: the checkpoint has no weight files.
    """
    if checkpoint.is_pt:
        return [Path(checkpoint.place)]
    own = run_checkpoint.weight_files(Path(checkpoint.place)) if checkpoint.is_run else []
    if checkpoint.base is not None:  # the base's files first, as `stored_tensors` expects
        files = weight_files(inspect_checkpoint(checkpoint.base))
        return [*files, *(own or [Path(checkpoint.place) / adapters.WEIGHTS])]
    if own:
        return own
    for name in _LAYOUTS:
        if single := _find(checkpoint.place, name):
            return [single]
        if index := _find(checkpoint.place, f"{name}.index.json"):
            return _parts(checkpoint.place, index)
    raise UserError(
        f"checkpoint {checkpoint.place}: holds no weights ({' or '.join(_LAYOUTS)}, whole or in "
        "parts); check the path or the id"
    )


def _find(place: str, name: str) -> Path | None:
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    try:
        found = cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _parts(place: str, index: Path) -> list[Path]:
    names = parts_of(index, place)
    found = {name: _find(place, name) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"checkpoint {place}: {index.name} names {missing[0]}, which is not there; fetch it "
            "again"
        )
    return [path for path in found.values() if path is not None]


def stored_tensors(checkpoint: Checkpoint, files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every weight in `files`, with the names that `transformers` saves.

    A tied weight is yielded once, also if it is stored twice. A `.pt` file and the folder that
    `save_pretrained` writes for its model yield the same.

    Raises:
        StorageError: a file is damaged.
    """
    folder = Path(checkpoint.place)
    if checkpoint.base is not None:
        base = [path for path in files if path.parent != folder]
        yield from stored_tensors(inspect_checkpoint(checkpoint.base), base)
        if checkpoint.is_run:
            yield from run_checkpoint.stored(folder)
        else:
            yield from _tensors(files[-1])
        return
    model = _without_weights(checkpoint)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if checkpoint.is_pt:
        state = pt_checkpoint.read_state(files[0])
        kept = {name: tensor for name, tensor in state.items() if name not in tied}
        yield from sorted(revert_weight_conversion(model, kept).items())
        return
    if checkpoint.is_run:
        state = dict(run_checkpoint.stored(folder, model))
        yield from sorted(revert_weight_conversion(model, state).items())
        return
    for path in files:
        for name, tensor in _tensors(path):
            if name not in tied:
                yield name, tensor


def _without_weights(checkpoint: Checkpoint) -> PreTrainedModel:
    try:
        return empty_model(checkpoint.config)
    except Exception as error:  # bad values fail anywhere in the architecture's code
        raise UserError(
            f"checkpoint {checkpoint.place}: no model can be built from its config.json "
            f"({type(error).__name__}: {first_line(error)}); fetch it again"
        ) from error


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".bin":
        try:
            check_regular(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
            tensors = sorted((name, tensor) for name, tensor in state.items())
        except Exception as error:  # including the unpickler's own exceptions
            raise StorageError(
                f"{path}: damaged weights ({first_line(error)}); fetch it again; nothing in it was "
                "executed"
            ) from error
        yield from tensors
        return
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{path}: damaged weights ({error}); fetch it again") from error
