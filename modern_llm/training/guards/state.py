"""State of the guards that can veto an optimizer step: non-finite gradients and loss spikes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


def no_spikes() -> dict[str, Any]:
    """Return the running statistics of the loss before the first step."""
    return {"count": 0, "mean": 0.0, "variance": 0.0, "skipped": 0, "in_a_row": 0}


@dataclass
class GuardState:
    """Counts of skipped steps, and the statistics that decide about the next one. Part of every
    checkpoint."""

    nonfinite: dict[str, int] = field(default_factory=lambda: {"total": 0, "in_a_row": 0})
    """Steps with a non-finite gradient: their total, and the consecutive ones without a scaler."""
    spikes: dict[str, Any] = field(default_factory=dict)
    """Running statistics of the loss; empty without `skip_loss_spikes`."""
    overflows_in_a_row: int = 0
    """Consecutive steps skipped by a float16 loss scaler. Not saved: the scaler's scale is."""
    judged: tuple[int, bool] = (-1, False)
    """The last step whose loss was compared with `spikes`, and whether it is a spike."""
    logged: int = 0
    """Value of `skipped` at the last logged line."""
    skips: set[int] = field(default_factory=set)
    """Steps (from 0) known to be skipped and not yet left out of the averages. Not saved."""
    pending: Callable[[], None] | None = None
    """Check of the last step, run once its finite flag has arrived from the device."""

    @property
    def skipped(self) -> int:
        """Number of steps known to be skipped, for any reason."""
        return self.nonfinite["total"] + self.spikes.get("skipped", 0)

    def settle(self) -> None:
        """Run the pending check of the last step.

        Raises:
            NotFiniteError: it was not applied, and the run must stop.
        """
        check, self.pending = self.pending, None
        if check is not None:
            check()

    def saved(self) -> dict[str, Any]:
        """Return the saved part of the state, for JSON."""
        return {"passed_over": dict(self.nonfinite), "spikes": dict(self.spikes)}

    def load(self, saved: Mapping[str, Any]) -> None:
        """Restore the result of `saved`.

        Raises:
            LookupError, TypeError, ValueError: `saved` is damaged.
        """
        self.nonfinite = {name: int(saved["passed_over"][name]) for name in self.nonfinite}
        if saved["spikes"]:
            self.spikes = {k: type(v)(saved["spikes"][k]) for k, v in self.spikes.items()}
