"""Models of checkpoints as placeholders, whose weights are read one parameter at a time.

Under ZeRO-3 and FSDP2 no process then holds a whole model. Files stay mapped. Names and layouts
that `transformers` converts while loading (stacked experts, older names) are converted the same
way, one parameter at a time.
"""

from __future__ import annotations

import copy
import zipfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from modern_llm.config.errors import StorageError
from modern_llm.config.printable import first_line
from modern_llm.models import pt_checkpoint
from modern_llm.models.checkpoint_tensors import weight_files
from modern_llm.models.load import Checkpoint
from modern_llm.models.run_checkpoint import WEIGHTS, Shards
from modern_llm.models.twin import fewer_layers
from modern_llm.models.unread import placeholder_model, set_reader
from modern_llm.storage.atomic import verified_manifest
from modern_llm.storage.regular_files import check_regular

Read = Callable[[], Tensor]


class CannotWait(Exception):
    """The weights of this checkpoint cannot be read one by one; the message says why."""


def load_model_later(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the float32 model of a checkpoint as placeholders.

    Raises:
        CannotWait: use `load_model`, which also reports damaged and missing weights.
    """
    place = Path(checkpoint.place)
    if checkpoint.base is not None:
        raise CannotWait("its adapters are merged into their base")
    if checkpoint.is_run:
        verified_manifest(place)
    try:
        model = placeholder_model(checkpoint.config)
        fewer = fewer_layers(type(model), model.config)
    except Exception as error:  # the model's code may raise anything
        raise CannotWait(f"it cannot be built without weights ({first_line(error)})") from error
    if fewer is None:
        raise CannotWait("its layers are all of different kinds, so all are probed")
    if checkpoint.is_pt:
        readers = _pt_readers(place, model)
    elif checkpoint.is_run:
        readers = _run_readers(place, model)
    else:
        readers = _folder_readers(checkpoint, model)
    _set_readers(model, readers)
    try:
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.place)
    except (OSError, ValueError):
        pass  # the checkpoint has none: it comes from the model's configuration
    return model


def _set_readers(model: PreTrainedModel, readers: dict[str, Read]) -> None:
    """Let each placeholder read its weights, and read the buffers that files hold."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for parameter in model.parameters():
        # A file may hold both names of a tied weight; `transformers` uses the one tied to.
        known = [n for n in sorted(names[id(parameter)], key=tied.__contains__) if n in readers]
        if not known:
            raise CannotWait(f"{names[id(parameter)][0]} is missing")
        if not all(torch.equal(readers[known[0]](), readers[other]()) for other in known[1:]):
            raise CannotWait(f"{' and '.join(known)} are tied and have different values")
        set_reader(parameter, partial(_checked, readers[known[0]], known[0], parameter.shape))
    for name, buffer in model.named_buffers():
        if name in readers:
            buffer.copy_(_checked(readers[name], name, buffer.shape))
        elif name in model.state_dict():
            raise CannotWait(f"{name} is missing")


def _checked(read: Read, name: str, shape: torch.Size) -> Tensor:
    tensor = read()
    if tensor.shape != shape:
        raise StorageError(
            f"{name} has shape {tuple(tensor.shape)} in its file, expected {tuple(shape)}: the "
            "checkpoint is of another model; fetch it again"
        )
    return tensor


def _folder_readers(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, Read]:
    """Return what reads each tensor of a `transformers` folder, by its name in the model."""
    stored: dict[str, Read] = {}
    for path in weight_files(checkpoint):
        stored |= _stored(path)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    readers: dict[str, Read] = {}
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    # In the order of `transformers`, which numbers experts by it.
    for key in sorted(stored, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            continue
        if pattern is None:
            readers[name] = stored[key]
        else:
            groups[name].append((key, pattern))
    for first, members in groups.items():
        converter = of_pattern[members[0][1]]
        parts = [(key, pattern, stored[key]) for key, pattern in members]
        for target in converter.target_patterns:
            name = first.replace(converter.target_patterns[0], target)
            readers[name] = partial(_converted, model, converter, first, parts, name)
    return readers


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Sort numbers within names by their value."""
    parts = key.split(".")
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _converted(
    model: PreTrainedModel,
    converter: WeightConverter,
    first: str,
    parts: list[tuple[str, str, Read]],
    name: str,
) -> Tensor:
    """Return one tensor of the model that `converter` makes of several stored ones."""
    used = copy.deepcopy(converter)
    for key, pattern, read in parts:
        used.add_tensor(first, key, pattern, read)
    made = used.convert(first, model=model, config=model.config)[name]
    return made[0] if isinstance(made, list) else made


def _stored(path: Path) -> dict[str, Read]:
    """Return what reads each tensor of one weight file, by its name in the file."""
    check_regular(path)
    try:
        if path.suffix != ".bin":
            file = safe_open(path, framework="pt")
            return {key: partial(file.get_tensor, key) for key in file.keys()}  # noqa: SIM118
        _check_mappable(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CannotWait(f"{path.name}: {first_line(error)}") from error
    return {key: partial(_same, tensor) for key, tensor in state.items()}


def _check_mappable(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise CannotWait(f"{path.name} has the format of torch before 1.6, which is read whole")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _pt_readers(path: Path, model: PreTrainedModel) -> dict[str, Read]:
    _check_mappable(path)
    state = pt_checkpoint.checked_state(path, model)
    return {name: partial(_same, tensor) for name, tensor in state.items()}


def _run_readers(folder: Path, model: PreTrainedModel) -> dict[str, Read]:
    shards = Shards(folder, WEIGHTS)
    tensors = model.state_dict()
    return {
        name: partial(shards.whole, name, tensors[name].shape, tensors[name].dtype)
        for name in shards.names()
        if name in tensors
    }
