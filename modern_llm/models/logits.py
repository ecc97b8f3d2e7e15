"""Measure how a model bounds its logits, at sizes that its present weights do not reach.

A soft cap of 30 has no effect on the logits of a new model, but training may reach it later. So
hooks multiply the last states by a factor before the head; weights stay the same. The model's own
logits are then compared with the fused head's, on the loaded model and on its twin.
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

# Standard deviations of the compared logits. A trained model reaches the first; a bound far above
# the second has no effect on a softmax.
SIZES = (15.0, 150.0)
# If both give the same largest logit, it is the bound. 16-bit floats represent these sizes.
BOUNDED = (4e3, 8e3)
# Largest relative rounding of a number from the configuration, by weight dtype.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The tolerance is for logits up to this size; rounding grows with them.
USUAL = 16.0


class LastStates:
    """Last states of one row of tokens, with a hook that enlarges them.

    Args:
        ids: (L,) tokens of the row.
        tolerance: largest difference of a log-prob for usual logits.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, tolerance: float):
        self._model, self._ids, self._tolerance = model, ids.to(model.device)[None], tolerance
        self._hooks: list[str] = []
        self._spread = float(self._find_hooks().std())

    @property
    def can_grow(self) -> bool:
        """Whether larger states give larger logits; not with a head of zeros."""
        return bool(self._hooks) and self._spread > 0

    def _find_hooks(self) -> Tensor:
        """Return the logits (L, V), and record which modules a hook can enlarge the states in."""
        head, base = self._model.get_output_embeddings(), self._model.base_model

        def see_base(module: nn.Module, args: object, output: object) -> None:
            if isinstance(getattr(output, "last_hidden_state", None), Tensor):
                self._hooks.append("base")

        def see_head(module: nn.Module, args: tuple) -> None:
            if args:
                self._hooks.append("head")

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
        """Scale the states so that unbounded logits have a standard deviation of `size`."""
        factor = max(size / self._spread, 1.0)

        def grow_base(module: nn.Module, args: object, output: object) -> object:
            output.last_hidden_state = output.last_hidden_state * factor
            return output

        def grow_head(module: nn.Module, args: tuple) -> tuple:
            return (args[0] * factor, *args[1:])

        if self._hooks[0] == "base":
            handle = self._model.base_model.register_forward_hook(grow_base)
        else:
            handle = self._model.get_output_embeddings().register_forward_pre_hook(grow_head)
        try:
            yield
        finally:
            handle.remove()

    def bound(self) -> float | None:
        """Return the bound of the logits, None if there is no exact one.

        A number of the configuration near the measured bound replaces it, because 16-bit weights
        round it.
        """
        if not self.can_grow:
            return None
        largest = []
        for size in BOUNDED:
            try:
                with self._enlarged(size):
                    largest.append(float(self._logits().abs().max()))
            except Exception as error:  # the model's code may raise anything
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
        """Whether the configuration contains the number `bound`."""
        return bound in self._numbers()

    def _numbers(self) -> list[float]:
        config = self._model.config
        values = [*vars(config.get_text_config()).values(), *vars(config).values()]
        return [float(n) for n in values if isinstance(n, int | float) and n > 0]

    @torch.no_grad()
    def differs(self, capabilities: Capabilities) -> str:
        """Return how a scorer with `capabilities` differs at large logits, or ""."""
        for size in SIZES if self.can_grow else ():
            try:
                with self._enlarged(size):
                    worst, allowed = self._distance(capabilities)
            except Exception as error:  # the model's code may raise anything
                return f"does not run where logits are near {size:g} ({first_line(error)})"
            if not worst <= allowed:
                return f"differs by {worst:.2g} nats a token where logits are near {size:g}"
        return ""

    def _distance(self, capabilities: Capabilities) -> tuple[float, float]:
        """Return the largest difference of a log-prob, and its tolerance."""
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
    """Return targets (2, N): at each position its most and least likely tokens, and some others."""
    count = min(4, logits.shape[-1])
    some = torch.arange(count, device=logits.device).expand(len(logits), count)
    high, low = (logits.topk(count, largest=largest).indices for largest in (True, False))
    tokens = torch.cat([high, low, some], -1)
    rows = torch.arange(len(logits), device=logits.device)[:, None].expand_as(tokens)
    return torch.stack([rows.flatten(), tokens.flatten()])


def bounds_of(models: list[LastStates]) -> list[float | None]:
    """Return the bound of each model's logits. If a model's logits cannot grow, the bound of the
    other models is used if it is in its configuration."""
    found = [model.bound() for model in models]
    others = next((b for b in found if b is not None), None)
    return [
        others if not model.can_grow and model.states(others) else bound
        for model, bound in zip(models, found, strict=True)
    ]


def fuse(model: PreTrainedModel, bound: float | None) -> bool:
    """Fuse the head of a model with this bound of the logits; False if it is not a linear layer."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return head is not None and fuse_head(head, LogitTransform(scale=scale, softcap=bound))
