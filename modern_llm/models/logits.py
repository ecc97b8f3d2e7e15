"""Measure what a model does to its logits at sizes that its present weights do not reach.

A soft cap of 30 changes no bit of the logits of a new model, and a bound of the last states none
of a trained one. Training may reach both later. Here the last states of a model are multiplied by
a factor on their way to the head, by hooks: no weight changes. The model's own logits are then
compared with the fused head's. Called by `probe`, on the loaded model and on its twin.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config.printable import first_line
from modern_llm.models.head import LogitTransform, fuse_head
from modern_llm.models.routers import without_router_loss
from modern_llm.models.scorer import Capabilities, TokenScorer

log = logging.getLogger(__name__)

# Standard deviations of the logits at which both are compared. A trained model reaches the first; a
# bound far above the second changes no softmax.
SIZES = (15.0, 150.0)
# Where these two give the same largest logit, it is a bound. 16 bits reach that far.
BOUNDED = (4e3, 8e3)
# Largest rounding of a number of the configuration by the dtype of the weights.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The tolerance is meant for logits up to this size; their rounding grows with them.
USUAL = 16.0


class LastStates:
    """The last states of one row of tokens, and a hook that enlarges them.

    Args:
        ids: (L,) tokens of the row.
        tolerance: largest difference of a log-prob for usual logits.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, tolerance: float):
        self._model, self._ids, self._tolerance = model, ids.to(model.device)[None], tolerance
        self._places: list[str] = []
        self._spread = float(self._look().std())

    @property
    def can_grow(self) -> bool:
        """Whether larger states give larger logits: a head of zeros gives none."""
        return bool(self._places) and self._spread > 0

    def _look(self) -> Tensor:
        """Return the logits (L, V); note the modules through which the model's own forward sends
        the states, the base model first."""
        head, base = self._model.get_output_embeddings(), self._model.base_model

        def see_base(module: nn.Module, args: object, output: object) -> None:
            if isinstance(getattr(output, "last_hidden_state", None), Tensor):
                self._places.append("base")

        def see_head(module: nn.Module, args: tuple) -> None:
            if args:
                self._places.append("head")

        handles = [] if head is None else [head.register_forward_pre_hook(see_head)]
        if base is not self._model:
            handles.append(base.register_forward_hook(see_base))
        try:
            return self._logits()
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        model = self._model
        output = model(input_ids=self._ids, use_cache=False, **without_router_loss(model))
        logits = output.logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @contextmanager
    def _enlarged(self, size: float) -> Iterator[None]:
        """Let the logits have a standard deviation of `size`, as far as nothing bounds them."""
        factor = max(size / self._spread, 1.0)

        def grow_base(module: nn.Module, args: object, output: object) -> object:
            output.last_hidden_state = output.last_hidden_state * factor
            return output

        def grow_head(module: nn.Module, args: tuple) -> tuple:
            return (args[0] * factor, *args[1:])

        if self._places[0] == "base":
            handle = self._model.base_model.register_forward_hook(grow_base)
        else:
            handle = self._model.get_output_embeddings().register_forward_pre_hook(grow_head)
        try:
            yield
        finally:
            handle.remove()

    def bound(self) -> float | None:
        """Return the bound of the logits; None where there is none, or none that is exact.

        It is the number of the configuration where that has one of this size: 16 bits round it.
        """
        if not self.can_grow:
            return None
        largest = []
        for size in BOUNDED:
            try:
                with self._enlarged(size):
                    largest.append(float(self._logits().abs().max()))
            except Exception as error:  # foreign code
                log.debug("%s: %s", type(self._model).__name__, error)
                return None
        rounding = ROUNDING[self._model.dtype]
        if not abs(largest[1] - largest[0]) <= rounding * largest[0]:
            return None
        nearest = min(self._numbers(), key=lambda n: abs(n - largest[1]), default=0.0)
        if abs(nearest - largest[1]) <= rounding * largest[1]:
            return nearest
        return largest[1] if rounding < 1e-3 else None

    def states(self, bound: float | None) -> bool:
        """Whether the configuration has this number."""
        return bound in self._numbers()

    def _numbers(self) -> list[float]:
        config = self._model.config
        values = [*vars(config.get_text_config()).values(), *vars(config).values()]
        return [float(n) for n in values if isinstance(n, int | float) and n > 0]

    @torch.no_grad()
    def differs(self, capabilities: Capabilities) -> str:
        """Say how a scorer with `abilities` differs where logits are large, or ""."""
        for size in SIZES if self.can_grow else ():
            try:
                with self._enlarged(size):
                    worst, allowed = self._distance(capabilities)
            except Exception as error:  # foreign code
                return f"does not run where logits are near {size:g} ({first_line(error)})"
            if not worst <= allowed:
                return f"differs by {worst:.2g} nats a token where logits are near {size:g}"
        return ""

    def _distance(self, capabilities: Capabilities) -> tuple[float, float]:
        """Return the largest difference of a log-prob, and how large it may be."""
        expected = self._logits()
        if not bool(torch.isfinite(expected).all()):
            return 0.0, 0.0  # beyond the range of 16 bits
        targets = _extremes(expected)
        positions = torch.arange(self._ids.shape[1], device=self._ids.device)[None]
        segments = positions.new_zeros(*self._ids.shape, 2)
        scorer = TokenScorer(self._model, replace(capabilities, trees=False))
        found = scorer(self._ids, positions, segments, targets).logprobs
        worst = (found - expected.log_softmax(-1)[targets[0], targets[1]]).abs().max()
        return float(worst), self._tolerance * max(1.0, float(expected.abs().max()) / USUAL)


def _extremes(logits: Tensor) -> Tensor:
    """Return (2, N): each position with its likeliest and least likely tokens, and some others."""
    count = min(4, logits.shape[-1])
    some = torch.arange(count, device=logits.device).expand(len(logits), count)
    high, low = (logits.topk(count, largest=largest).indices for largest in (True, False))
    tokens = torch.cat([high, low, some], -1)
    rows = torch.arange(len(logits), device=logits.device)[:, None].expand_as(tokens)
    return torch.stack([rows.flatten(), tokens.flatten()])


def bounds_of(models: list[LastStates]) -> list[float | None]:
    """Return the bound of each model's logits. Logits that cannot grow have that of the others, if
    it is a number of their configuration."""
    found = [model.bound() for model in models]
    others = next((b for b in found if b is not None), None)
    return [
        others if not model.can_grow and model.states(others) else bound
        for model, bound in zip(models, found, strict=True)
    ]


def fuse(model: PreTrainedModel, bound: float | None) -> bool:
    """Fuse the head of a model whose logits have this bound; False where it is no linear layer."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return head is not None and fuse_head(head, LogitTransform(scale=scale, softcap=bound))
