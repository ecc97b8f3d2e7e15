"""Micro-batches of a stream: each window has a `BatchSource` of its own, for its steps.

The order within a window is drawn from (seed, number of the window), as that of an epoch is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from modern_llm.data.batch.micro_batches import BatchSource, Lazy
from modern_llm.data.batch.order import Indices, Order
from modern_llm.data.table.windows import Window


@dataclass(frozen=True)
class _Without(Order):
    """The same steps without some examples, so that later steps stay what they are."""

    without: tuple[int, ...] = ()

    def step(self, step: int) -> Indices:
        """Return the other examples of a step, maybe none."""
        found = super().step(step)
        return found[~np.isin(found, self.without)]


def leave_out_of_steps(source: BatchSource, rows: tuple[int, ...]) -> None:
    """Let the steps that would have some examples go without them."""
    known = {field.name: getattr(source.order, field.name) for field in fields(Order)}
    source.order = _Without(**known, without=rows)


class WindowedSource:
    """The micro-batches of one rank over the current window; has the methods of `BatchSource`.

    Args:
        make: window -> the source of its examples.
        window: the first one.
    """

    def __init__(self, make: Callable[[Window], BatchSource], window: Window):
        self._make = make
        self.window = window
        # The last step of a window is judged after the next one is open.
        self._before: tuple[Window, BatchSource] | None = None
        self._source = make(window)
        self.auto = self._source.auto
        self._tokens: int | None = None

    def open(self, window: Window) -> None:
        """Continue with the next window."""
        source = self._make(window)
        if self._tokens is not None:
            source.limit(self._tokens)
        self._before, self.window, self._source = (self.window, self._source), window, source

    @property
    def order(self) -> Order:
        """The order of the current window's examples."""
        return self._source.order

    def ready(self, step: int) -> bool:
        """Whether the examples of `step` are in the current window."""
        return step < self.window.after.step

    def steps_in(self, epochs: float) -> int:
        """Return the optimizer steps of `epochs` epochs; in the first one, whose end is not known,
        one counts as the steps up to the end of the window."""
        steps = self.window.start.epoch_steps or self.window.after.step
        return max(1, round(epochs * steps))

    def consumed(self, steps: int) -> int:
        """Return the number of examples in the first `steps` steps."""
        start, after = self.window.start, self.window.after
        within = (steps - start.step) * self._source.order.batch_size
        return min(start.examples + within, after.examples)

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of one forward, None where only examples bound it."""
        return self._source.most_tokens

    def limit(self, tokens: int) -> None:
        """Lower the token budget of all later forwards."""
        self._tokens = tokens
        self._source.limit(tokens)

    def micro_batches(self, step: int) -> Lazy:
        """Return this rank's part of a training step."""
        source, at = self.at(step)
        return source.micro_batches(at)

    def origins(self, step: int) -> list[list[str]]:
        """Return the origins of the examples of each micro-batch of this rank."""
        source, at = self.at(step)
        return source.origins(at)

    def targets(self, step: int) -> int:
        """Return the target tokens of a step over all ranks."""
        source, at = self.at(step)
        return source.targets(at)

    def tokens(self, step: int) -> int:
        """Return the real tokens that are computed in a step over all ranks."""
        source, at = self.at(step)
        return source.tokens(at)

    def largest_forward(self, step: int) -> int:
        """Return the tokens of the largest forward of a step over all ranks."""
        source, at = self.at(step)
        return source.largest_forward(at)

    def largest_example(self) -> tuple[int, str]:
        """Return (padded tokens, origin) of the largest example of the window."""
        return self._source.largest_example()

    def at(self, step: int) -> tuple[BatchSource, int]:
        """Return the source of a step, and the step that its order knows it as."""
        window, source = self.window, self._source
        if step < window.start.step:
            assert self._before is not None
            window, source = self._before
        assert window.start.step <= step < window.after.step, (step, window)
        # Each window is the epoch of its number in an order of its own.
        return source, window.start.number * source.order.steps_per_epoch + (
            step - window.start.step
        )
