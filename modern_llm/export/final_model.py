"""Export of the trained model to a folder that plain `transformers` loads.

Sharded parameters are gathered one at a time. Rank 0 writes each to a file of its own, which it
maps: no process ever holds the whole model.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.optimizer_shards import full_parameters, replicated
from modern_llm.distributed.runtime import Runtime
from modern_llm.inference.generate import end_ids
from modern_llm.models.adapters import has_adapters, write_adapter_config, write_adapters
from modern_llm.storage.atomic import TEMPORARY
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_bytes

LARGE = 1 << 16
"""Elements of a gathered parameter that is kept in a file."""


def export(
    runtime: Runtime,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    ends: tuple[int | None, ...] = (),
) -> None:
    """Write float32 weights, or the trained adapters, with configuration and tokenizer; a
    collective.

    Args:
        ends: ids that end an answer besides the tokenizer's end token.
    """
    adapted = has_adapters(engine.inner)
    state, failure = _gathered(runtime, engine, folder.parent, adapted=adapted)
    with runtime.committed_folder(folder, {}) as temporary:
        if failure is not None:
            raise failure
        if runtime.is_main and adapted:
            name_special_ids(engine.inner, tokenizer, ends)
            with around("export.write"):
                write_adapters(engine.inner, state, temporary)
                if tokenizer is not None:
                    tokenizer.save_pretrained(temporary)
        elif runtime.is_main:
            write_model(engine.inner, state, tokenizer, temporary, ends)


def _gathered(
    runtime: Runtime, engine: Engine, disk: Path, *, adapted: bool
) -> tuple[dict[str, Tensor], OSError | None]:
    """Return the parameters on rank 0, and an error of its disk; a collective.

    The error is raised later: other ranks would wait in the next collective.
    """
    state: dict[str, Tensor] = {}
    failure: OSError | None = None
    sharded = not replicated(engine)
    for name, tensor in full_parameters(engine, trained=adapted):
        heartbeat.tick()
        if not runtime.is_main or failure is not None:
            continue
        try:
            if sharded and tensor.numel() >= LARGE:
                state[name] = _mapped(tensor, disk)
            else:
                state[name] = tensor.to("cpu", copy=tensor.device.type == "cpu")
        except OSError as error:
            failure = error
    return state, failure


def _mapped(tensor: Tensor, disk: Path) -> Tensor:
    """Return a copy of `tensor` that is mapped from a file in the folder `disk`."""
    whole = tensor.detach().cpu().contiguous()
    path = disk / f"{TEMPORARY}gathered-{os.getpid()}"
    try:
        with around("gathered.write"), path.open("wb") as file:
            file.write(memoryview(whole.view(-1).view(torch.uint8).numpy()))
        mapped = torch.from_file(str(path), shared=False, size=whole.numel(), dtype=whole.dtype)
    finally:
        path.unlink(missing_ok=True)  # a mapping keeps the data
    return mapped.view(whole.shape)


def write_model(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    ends: tuple[int | None, ...] = (),
) -> None:
    """Write a `transformers` folder from the parameters `state`, name -> tensor, tied ones once."""
    shape = _shape_of(model, tokenizer, ends)
    with around("export.write"):
        shape.save_pretrained(folder, state_dict=_with_ties_and_buffers(model, state))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def model_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    ends: tuple[int | None, ...] = (),
) -> dict[str, bytes]:
    """Return path and content of the files that a folder of weights needs to be a model.

    Configuration (of adapters where these are trained) and tokenizer; small beside the weights.
    """
    with tempfile.TemporaryDirectory(prefix="modern-llm-") as name:
        folder = Path(name)
        with around("describe.write"):
            if has_adapters(model):
                write_adapter_config(model, folder)
            else:
                shape = _shape_of(model, tokenizer, ends)
                shape.config.architectures = [type(model).__name__]
                shape.config.save_pretrained(folder)
                shape.generation_config.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): read_bytes(path) for path in files}


def _shape_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ends: tuple[int | None, ...]
) -> PreTrainedModel:
    """Return a float32 model on the meta device with the configurations to write.

    The weights of `model` may be sharded, or rounded to bfloat16; its configurations stay.
    """
    with torch.device("meta"):
        shape = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32)
    shape.generation_config = copy.deepcopy(model.generation_config)
    name_special_ids(shape, tokenizer, ends)
    return shape


def name_special_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, ends: tuple[int | None, ...]
) -> None:
    """Set special ids that a model's configurations lack from the tokenizer."""
    generation = model.generation_config
    vocabulary = model.config.get_text_config().vocab_size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own = getattr(tokenizer, name, None)
        if own is None or own >= vocabulary:
            continue  # a padding token outside the embedding: no model loads with such an id
        if getattr(model.config, name, None) is None:
            setattr(model.config, name, own)
        if getattr(generation, name, None) is None:
            setattr(generation, name, own)
    known = end_ids(model, ends)
    if len(known) > 1:
        generation.eos_token_id = known
    # Some published models set a temperature without do_sample, which transformers reads but
    # refuses to write.
    sampled = any(getattr(generation, n, None) not in (None, 1.0) for n in ("temperature", "top_p"))
    if not generation.do_sample and (sampled or getattr(generation, "top_k", None)):
        generation.do_sample = True


def _with_ties_and_buffers(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, Any]:
    """Return the state dictionary for `save_pretrained`: all names, tied ones included."""
    names = {id(p): n for n, p in model.named_parameters()}
    result = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        result[name] = parameters.get(names.get(id(tensor), name))
        if result[name] is None:
            result[name] = tensor.detach().cpu()
    return result
