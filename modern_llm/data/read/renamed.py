"""A source whose columns have other names than those that the formats read (`data.columns`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modern_llm.data.read.columns import named
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import Broken
from modern_llm.data.read.sources import Source


@dataclass(frozen=True)
class RenamedColumns:
    """A source with its columns under the names of a format.

    `columns` is name in the format -> name in the source. A column of the source that already has
    a name of the format is hidden by the mapped one.
    """

    source: Source
    columns: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the source."""
        return self.source.name

    @property
    def identity(self) -> list[str]:
        """Identity of the source; the section, which has the names, is compared with it."""
        return self.source.identity

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the source."""
        return getattr(self.source, "notes", ())

    def __iter__(self) -> Iterator[Row | Broken]:
        for row in self.source:
            if isinstance(row, Broken):
                yield row
            elif lost := [f"{ours} from {name!r}" for ours, name in self._missing(row.values)]:
                found = named(row.values)
                yield Broken(
                    row.origin, f"columns reads {', '.join(lost)}; the row has only {found}"
                )
            else:
                yield Row(_Renamed(row.values, self.columns), row.origin)

    def _missing(self, values: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(ours, name) for ours, name in self.columns.items() if name not in values]


class _Renamed(Mapping[str, Any]):
    """The values of one row under other names; converted when they are read, as in the source."""

    def __init__(self, values: Mapping[str, Any], columns: Mapping[str, str]):
        self._values = values
        taken = set(columns.values())
        kept = (name for name in values if name not in taken and name not in columns)
        self._names = {**{name: name for name in kept}, **columns}

    def __getitem__(self, name: str) -> Any:
        return self._values[self._names[name]]

    def is_null(self, name: str) -> bool:
        """Whether a column has no value in this row."""
        ask = getattr(self._values, "is_null", None)
        return self[name] is None if ask is None else ask(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
