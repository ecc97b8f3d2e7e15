"""Find the modules of a model that mix tokens otherwise than by the tree attention.

One forward over a row of trees, in which hooks replace all inputs and results of modules by those
of plain sequences. A module that still computes another value, for itself or for a module that it
calls, mixes tokens in its own code. No list of class names is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.models.mixers import sequences_of
from modern_llm.models.routers import without_router_loss

# Largest difference of a result by rounding, as a share of the largest result.
ROUNDING = 1e-3


@torch.no_grad()
def find_mixers(
    model: PreTrainedModel,
    pairs: list[list[Tensor]],
    segments: Tensor,
    forward: Callable[[], object],
    native: str,
) -> set[type]:
    """Return the classes of the outermost modules that mix tokens themselves.

    Args:
        pairs: trees [prompt, answer, answer ...].
        segments: of the row (1, L, 2) that holds them.
        forward: runs the model on that row, with the tree attention that is set.
        native: name of the model's own attention.
    """
    sequences = [torch.cat([prompt, a]) for prompt, *answers in pairs for a in answers]
    comparison = _Comparison(model, segments)
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation(native)
        for number, ids in enumerate(sequences):
            with comparison.recording(number):
                plain = ids.to(model.device)[None]
                model(input_ids=plain, use_cache=False, **without_router_loss(model))
    finally:
        model.set_attn_implementation(attention)
    with comparison.corrected():
        forward()
    wrong = comparison.wrong
    if "" in wrong:  # the model mixes tokens outside of its layers
        return set()
    inside = tuple(f"{name}." for name in wrong)
    return {kind for name, kind in wrong.items() if not name.startswith(inside)}


class _Comparison:
    """Results of the modules in a row of trees, compared with those in plain sequences.

    Attributes:
        wrong: name -> class of the modules whose results differ.
    """

    def __init__(self, model: PreTrainedModel, segments: Tensor):
        self.wrong: dict[str, type] = {}
        self._segments = segments
        self._places = list(sequences_of(segments))
        base = model.base_model
        self._modules = dict(base.named_modules())
        # By (module, call, place of the tensor): one tensor per sequence.
        self._expected: dict[tuple[object, ...], dict[int, Tensor]] = defaultdict(dict)

    @contextmanager
    def recording(self, number: int) -> Iterator[None]:
        """Record what all modules get and return in a plain sequence of the model."""
        length = len(self._places[number])

        def see(place: tuple[object, ...], tensor: Tensor, author: str) -> Tensor:
            if tensor.shape[:2] == (1, length):
                self._expected[place][number] = tensor.detach().clone()
            return tensor

        with self._seen(see):
            yield

    @contextmanager
    def corrected(self) -> Iterator[None]:
        """Give all modules the inputs and results of plain sequences, and compare the results."""

        def see(place: tuple[object, ...], tensor: Tensor, author: str) -> Tensor:
            expected = self._expected.get(place, {})
            whole = tensor.shape[:2] == self._segments.shape[:2]
            if not whole or len(expected) < len(self._places):
                return tensor
            right = tensor.clone()
            for number in reversed(range(len(self._places))):  # a prefix is of its first copy
                right[0, self._places[number]] = expected[number][0].to(tensor)
            off = float((right - tensor).abs().max())
            if not off <= ROUNDING * float(right.abs().max()):
                # A wrong input comes from the code of the module that calls this one.
                self.wrong[author] = type(self._modules[author])
            return right

        with self._seen(see):
            yield

    @contextmanager
    def _seen(self, see: Callable[[tuple[object, ...], Tensor, str], Tensor]) -> Iterator[None]:
        """Replace each floating tensor that a module gets or returns by what `see` returns."""
        calls: dict[str, int] = defaultdict(int)
        running = [""]

        def change(values: Any, name: str, kind: str) -> Any:
            def one(key: object, value: Any) -> Any:
                if not isinstance(value, Tensor) or not value.is_floating_point():
                    return value
                return see((name, calls[name], kind, key), value, running[-1])

            if isinstance(values, dict):
                return {key: one(key, value) for key, value in values.items()}
            if type(values) is tuple:
                return tuple(one(key, value) for key, value in enumerate(values))
            return one(0, values)

        def before(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                calls[name] += 1
                given = change(args, name, "given"), change(kwargs, name, "named")
                running.append(name)
                return given

            return hook

        def after(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple, result: Any) -> Any:
                result = change(result, name, "result")
                running.pop()
                return result

            return hook

        handles = []
        for name, module in self._modules.items():
            if not name:  # the model itself: its code is that of "" in `running`
                continue
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
