"""New models as placeholders: the weights of `build_model`, drawn one module at a time.

`build_model` draws twice: while modules are constructed, and again by the model's own rule. One
pass over both, which keeps no weights, records the state of the generator before each module of the
second. From there each module's weights can be drawn alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PretrainedConfig, PreTrainedModel

from modern_llm.config import ModernLLMConfig
from modern_llm.models.build import from_transformers_config, to_transformers_config
from modern_llm.models.unread import placeholder_model, set_reader


def build_model_later(config: ModernLLMConfig, *, seed: int) -> PreTrainedModel:
    """Return the model of `build_model` as placeholders."""
    made = to_transformers_config(config)
    model = placeholder_model(made)
    draws = _Draws(made, seed)
    for name, parameter in model.named_parameters():
        set_reader(parameter, partial(draws.read, name))
    return model


class _Draws:
    """Initial weights of a model, drawn on request."""

    def __init__(self, config: PretrainedConfig, seed: int):
        self._config, self._seed = config, seed

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """Return the initial weights of one parameter."""
        path, _, leaf = name.rpartition(".")
        module = self._model.get_submodule(path)
        owner, state = self._states[id(module)]
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            _draw(owner, module)
        weights = module._parameters[leaf].data
        _drop(module)
        return weights

    @property
    def _states(self) -> dict[int, tuple[PreTrainedModel, Tensor]]:
        return self._recorded[0]

    @property
    def _model(self) -> PreTrainedModel:
        return self._recorded[1]

    @cached_property
    def _recorded(self) -> tuple[dict[int, tuple[PreTrainedModel, Tensor]], PreTrainedModel]:
        """Owner and generator state of each module, and a model without weights."""
        states: dict[int, tuple[PreTrainedModel, Tensor]] = {}

        def record(model: PreTrainedModel) -> None:
            for owner, module in _modules(model, model):
                if id(module) not in states:  # those of an inner model have been drawn
                    states[id(module)] = owner, torch.get_rng_state()
                    _draw(owner, module)
                    _drop(module)

        with torch.random.fork_rng(devices=[]), torch.no_grad(), _initialized_by(record):
            torch.manual_seed(self._seed)
            return states, from_transformers_config(self._config)


def _modules(
    owner: PreTrainedModel, module: nn.Module
) -> Iterator[tuple[PreTrainedModel, nn.Module]]:
    """Yield modules in the order in which `transformers` initialises them, each with its model."""
    for child in module.children():
        yield from _modules(child if isinstance(child, PreTrainedModel) else owner, child)
    yield owner, module


def _draw(owner: PreTrainedModel, module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype)
    owner._init_weights(module)


def _drop(module: nn.Module) -> None:
    """Replace the weights of this module by one element each."""
    for parameter in module.parameters(recurse=False):
        parameter.data = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)


@contextmanager
def _initialized_by(record) -> Iterator[None]:  # noqa: ANN001
    """Drop the weights of each module when it is constructed, and initialise models by `record`."""
    hook = register_module_module_registration_hook(lambda parent, name, child: _drop(child))
    real = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = record
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = real
        hook.remove()
