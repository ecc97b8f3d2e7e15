"""Models whose weights are read later, one parameter at a time, when each process keeps its shard.

Such a model has all modules, real buffers, and parameters of the right shape and dtype on the CPU.
Each is a placeholder: one element, repeated without memory. Its attribute `unread` is a function
that reads the whole tensor, in the dtype of its file and maybe mapped. A placeholder has the value
0 until it is filled, so `Runtime` refuses a module that still has one after its start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from modern_llm.models.cpu.fused_ops import is_patched, patch_cpu_ops
from modern_llm.models.cpu.last_layer import narrow_last_layer, narrows
from modern_llm.models.head import FusedHead, fuse_head
from modern_llm.models.mixers import gather_mixers, mixers_of
from modern_llm.models.modes import held, hold
from modern_llm.models.shapes import empty_model
from modern_llm.models.training_mode import disable_dropout
from modern_llm.models.twin import fewer_layers


def placeholder_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a float32 model of placeholders without `unread`, in evaluation mode."""
    model = empty_model(config)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:  # tied parameters stay tied
                module._parameters[name] = made.setdefault(id(parameter), _placeholder(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    # As `from_pretrained` does for what no file holds: sets buffers such as rotary frequencies, and
    # skips every parameter with the flag that `_placeholder` sets.
    model.initialize_weights()
    return model.eval()


def _placeholder(parameter: nn.Parameter) -> nn.Parameter:
    # A storage of its own for each: Accelerate tells parameters apart by their address.
    empty = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
    result = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    result.__dict__.update(parameter.__dict__)
    result._is_hf_initialized = True
    return result


def set_reader(parameter: nn.Parameter, read: Callable[[], Tensor]) -> None:
    """Let `read` give the weights of a placeholder."""
    parameter.unread = read


def reader_of(parameter: nn.Parameter) -> Callable[[], Tensor] | None:
    """Return what reads a placeholder's weights; None for a parameter that has its weights."""
    return getattr(parameter, "unread", None)


def has_unread(model: nn.Module) -> bool:
    """Whether a parameter of `model` is a placeholder."""
    return any(reader_of(parameter) is not None for parameter in model.parameters())


def copy_reader(original: nn.Parameter, duplicate: nn.Parameter) -> None:
    """Let a copy of a placeholder read the same weights, and free its memory."""
    if (read := reader_of(original)) is not None:
        duplicate.data = torch.zeros(1, dtype=original.dtype).expand(original.shape)
        set_reader(duplicate, read)


@torch.no_grad()
def first_layers(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model of the first layers, one of each kind, with their weights on the CPU.

    `probe` measures it in place of a model of placeholders. None if the kinds are unknown.
    """
    config = fewer_layers(type(model), model.config)
    if config is None:
        return None
    small = placeholder_model(config)
    whole, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, parameter in small.named_parameters():
        read = reader_of(whole[name])
        weight = whole[name].data if read is None else read()
        parameter.data = weight.to(parameter.dtype, copy=True)
    for name, buffer in small.named_buffers():
        buffer.copy_(buffers[name])
    if small.config._attn_implementation != model.config._attn_implementation:
        small.set_attn_implementation(model.config._attn_implementation)
    return small


@torch.no_grad()
def adopt(model: PreTrainedModel, measured: PreTrainedModel, *, dropout: bool | None) -> None:
    """Set up `model` as `probe` has set up `measured`, its first layers.

    Args:
        dropout: the argument of `probe`.
    """
    if dropout is False:
        disable_dropout(model)
    for training in (False, True):
        hold([model], held(measured, training=training), training=training)
    if any(map(is_patched, measured.modules())):
        patch_cpu_ops(model)
    if narrows(measured):
        narrow_last_layer(model)
    gather_mixers(model, mixers_of(measured))
    head = measured.get_output_embeddings()
    if isinstance(head, FusedHead):
        fuse_head(model.get_output_embeddings(), head.transform)
    if model.config._attn_implementation != measured.config._attn_implementation:
        model.set_attn_implementation(measured.config._attn_implementation)
