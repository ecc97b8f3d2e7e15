"""Mixers with a state (Mamba, linear attention, convolutions) in rows that hold prefix trees.

Such a layer reads all tokens before in the row, whatever their branch. So around it, and nowhere
else, tokens are gathered into one sequence per response, with the prefix repeated and padding at
the end. The model's own module runs on them, and its results are scattered back; those of a prefix
come from its first copy. MLPs, attention, norms and the head still compute each prefix once.

`find_mixers` finds these modules by measuring, and `probe` checks the whole model.

Letters: R rows, L tokens of a row, S sequences, W tokens of a sequence.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from modern_llm.models.attention.paths import paths

# Sequences of one call have at least this share of its width, which bounds the padding.
SHORTEST = 0.7


class Routes:
    """Positions of the tokens of prefix trees in sequences, one per response, and back.

    Args:
        segments: (R, L, 2) or (R, L, 3), see `attention.visible`.

    Attributes:
        sequences: flat indices (S, W) into R * L of each group of sequences, the longest first.
        home: (R * L,) where each token's result is, in all sequences of all groups, flat.
    """

    def __init__(self, segments: Tensor):
        self.shape = tuple(segments.shape[:2])
        groups: list[list[Tensor]] = []
        for one in sorted(sequences_of(segments), key=len, reverse=True):
            if not groups or len(one) < SHORTEST * len(groups[-1][0]):
                groups.append([])
            groups[-1].append(one)
        # Padding is token 0 of the row: results there are not used.
        padded = [pad_sequence(group, batch_first=True) for group in groups]
        home = torch.zeros(segments.shape[0] * segments.shape[1], dtype=torch.long)
        end = sum(index.numel() for index in padded)
        for group, index in zip(reversed(groups), reversed(padded), strict=True):
            for one in reversed(group):  # the first copy of a prefix is written last
                end -= index.shape[1]
                home[one] = torch.arange(end, end + len(one))
        self.sequences = tuple(index.to(segments.device) for index in padded)
        self.home = home.to(segments.device)

    def gather(self, value: Any, index: Tensor) -> Any:
        """Return `value` with every tensor (R, L, ...) in it, or (1, L, ...), as (S, W, ...)."""
        if isinstance(value, Tensor):
            if value.ndim < 2 or value.shape[1] != self.shape[1]:
                return value
            if value.shape[0] not in (1, self.shape[0]):
                return value
            rows = value.expand(self.shape[0], *value.shape[1:]).flatten(0, 1)
            return rows.index_select(0, index.flatten()).unflatten(0, index.shape)
        if type(value) is dict:
            return {name: self.gather(each, index) for name, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self.gather(each, index) for each in value)
        return value

    def scatter(self, results: list[Any]) -> Any:
        """Return the results of all groups, (S, W, ...) each, as (R, L, ...)."""
        first = results[0]
        if isinstance(first, tuple):
            return tuple(self.scatter(list(each)) for each in zip(*results, strict=True))
        if not isinstance(first, Tensor) or first.shape[:2] != self.sequences[0].shape:
            return first
        flat = torch.cat([result.flatten(0, 1) for result in results])
        return flat.index_select(0, self.home).unflatten(0, self.shape)


def sequences_of(segments: Tensor) -> Iterator[Tensor]:
    """Yield the flat indices of each response with all before it, on the CPU, in order."""
    length = segments.shape[1]
    for row, one in enumerate(torch.stack(paths(segments), -1).cpu()):
        tree, order = one[:, 0].sort(stable=True)
        _, sizes = tree.unique_consecutive(return_counts=True)
        for here in order.split(sizes.tolist()):
            number, node, last = one[here].unbind(-1)
            if number[0] < 0:
                continue
            # A node is the deepest if the next node of its tree is not below it.
            ends = torch.cat([node[1:] > last[:-1], torch.ones(1, dtype=torch.bool)])
            for leaf in node[ends].tolist():
                yield row * length + here[(node <= leaf) & (leaf <= last)]


@cache
def _here() -> threading.local:
    """Return where `routed` keeps the routes: several threads may run one model."""
    return threading.local()


@contextmanager
def routed(routes: Routes | None) -> Iterator[None]:
    """Let the mixers of a model use these routes inside the `with` block."""
    before, _here().routes = _routes(), routes
    try:
        yield
    finally:
        _here().routes = before


@torch.compiler.disable
def _routes() -> Routes | None:
    return getattr(_here(), "routes", None)


def keep_routes(contexts: Callable[[], tuple] | None = None) -> Callable[[], tuple]:
    """Return a `context_fn` of `torch.utils.checkpoint`: recomputation uses the routes of the
    forward that it repeats, which need not be the last one.

    Args:
        contexts: another `context_fn` to combine with.
    """

    def both() -> tuple[AbstractContextManager, AbstractContextManager]:
        forward, again = contexts() if contexts else (nullcontext(), nullcontext())
        return forward, _nested(again, routed(_routes()))

    return both


@contextmanager
def _nested(*contexts: AbstractContextManager) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def gather_mixers(model: nn.Module, kinds: Iterable[type]) -> None:
    """Run the modules of these classes on sequences where `routed` gives routes; in place."""
    for module in model.modules():
        if type(module) in kinds and not _gathers(module):
            module.forward = MethodType(_gathering(module.forward.__func__), module)


def _gathering(forward: Callable) -> Callable:
    @torch.compiler.disable
    def gathering(self: nn.Module, *args: object, **kwargs: object) -> Any:
        routes = _routes()
        if routes is None:
            return forward(self, *args, **kwargs)
        results = []
        for index in routes.sequences:
            given, named = routes.gather(args, index), routes.gather(kwargs, index)
            results.append(forward(self, *given, **named))
        return routes.scatter(results)

    gathering.inner = forward
    return gathering


def _gathers(module: nn.Module) -> bool:
    return hasattr(getattr(vars(module).get("forward"), "__func__", None), "inner")


def mixers_of(model: nn.Module) -> set[type]:
    """Return the classes of the modules that `gather_mixers` changed."""
    return {type(module) for module in model.modules() if _gathers(module)}


def restore_mixers(model: nn.Module) -> None:
    """Undo `gather_mixers`."""
    for module in filter(_gathers, model.modules()):
        inner = module.forward.__func__.inner
        del module.forward
        if inner is not type(module).forward:  # another patch was there before
            module.forward = MethodType(inner, module)
