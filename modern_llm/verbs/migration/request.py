"""One configuration of another trainer, and what a rule of the tables says about an option."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class NoEquivalent(Exception):
    """A value that nothing here does; the message says why."""


class Off(Exception):
    """A value that switches something off which is off here too; the message says what."""


class Found(NamedTuple):
    """What one option sets here, and what is different about it."""

    values: dict[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Request:
    """One configuration to translate."""

    tool: str
    stage: str
    values: dict[str, Any]
    """Every option with its value: those of the file, and the trainer's defaults elsewhere."""
    written: frozenset[str]
    """Options that the file sets."""
    processes: int = 1

    def number(self, *names: str) -> float:
        """Return the first of these options that is a positive number, or 0."""
        found = (as_number(self.values.get(name)) for name in names)
        return next((value for value in found if value and value > 0), 0)

    @property
    def adapters(self) -> bool:
        """Whether it trains adapters."""
        values = self.values
        return bool(
            truth(values.get("use_peft"))
            or values.get("adapter") in ("lora", "qlora")
            or values.get("finetuning_type") == "lora"
        )


def as_number(value: Any) -> float | None:
    """Return a number, also of text as YAML reads `5e-5`; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() and not isinstance(value, float) else number


def truth(value: Any) -> bool:
    """Return whether a flag is on; text as on a command line counts too."""
    return value.lower() in ("true", "1", "yes") if isinstance(value, str) else bool(value)
