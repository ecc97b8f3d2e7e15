"""Counts of the used and dropped rows of a source, and the list of dropped rows.

`DataReport` is plain numbers, made by `prepare` and shown by the stages and `inspect`. `Drops`
writes `dropped_rows.jsonl` as the rows go by, and says when too many were dropped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from modern_llm.config.errors import DataError
from modern_llm.data.read.records import BROKEN, LEVELS, Dropped
from modern_llm.storage.fault_points import around

EMPTY_DOCUMENT = "empty document"
_SHOWN = 5
_SUMMED = (
    "rows",
    "kept",
    "examples",
    "evaluation_examples",
    "prompts_cut",
    "responses_cut",
    "tokens_cut",
    "tokens",
)


@dataclass
class DataReport:
    """Counts of one source.

    Attributes:
        source: what was read.
        rows: rows read, of which `kept` became examples; `drops` counts the others by reason.
        formats: rows kept, by the format in which they were read.
        examples, evaluation_examples: rows of the tables made from them (for documents these are
            rows of a fixed length, not documents).
        prompts_cut, responses_cut: how many truncation shortened.
        tokens_cut: tokens that truncation took, end tokens included; for documents the tokens that
            did not fill a last row.
        tokens: token ids in the tables.
        notes: what a user should know, a line each.
        values: `weight`, `margin` or `label`, `responses` and `tied responses` of rankings -> rows,
            sum, smallest and largest, where there are.
    """

    source: str
    rows: int = 0
    kept: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    examples: int = 0
    evaluation_examples: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    tokens_cut: int = 0
    tokens: int = 0
    notes: list[str] = field(default_factory=list)
    values: dict[str, dict[str, float]] = field(default_factory=dict)

    def count(self, numbers: Mapping[str, float] | None) -> None:
        """Count the numbers of one row; of a ranking its responses and those that tie."""
        counted = {n: v for n, v in (numbers or {}).items() if n not in LEVELS}
        if numbers and LEVELS[0] in numbers:
            levels = [numbers[name] for name in LEVELS if numbers[name] >= 0]
            counted["responses"] = float(len(levels))
            counted["tied responses"] = float(sum(levels.count(level) > 1 for level in levels))
        for name, value in counted.items():
            one = {"rows": 1, "sum": value, "min": value, "max": value}
            known = self.values.get(name)
            self.values[name] = _added(known, one) if known else one

    def note_values(self) -> None:
        """Add a note on each of the numbers."""
        for name, found in self.values.items():
            if name == "label":
                good = int(found["sum"])
                bad = int(found["rows"]) - good
                self.notes.append(f"{self.source}: {good:,} desirable, {bad:,} undesirable rows")
                continue
            mean = found["sum"] / found["rows"]
            text = f"{found['min']:g} to {found['max']:g}, mean {mean:.4g}"
            self.notes.append(f"{self.source}: {name} of {found['rows']:,} rows: {text}")

    @property
    def dropped(self) -> int:
        """Rows read that are not used."""
        return sum(self.drops.values())

    @property
    def dropped_for_content(self) -> int:
        """Those of them that `max_dropped` judges; empty documents cost nothing."""
        return self.dropped - self.drops.get(BROKEN, 0) - self.drops.get(EMPTY_DOCUMENT, 0)

    def as_dict(self) -> dict[str, Any]:
        """Return all counts by name, as JSON can hold them."""
        return {**asdict(self), "dropped": self.dropped}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataReport:
        """Return the report that `as_dict` was called on."""
        return cls(**{name: value for name, value in values.items() if name != "dropped"})

    @classmethod
    def merged(cls, parts: list[DataReport]) -> DataReport:
        """Return the sums over several sources; of one source, that report itself."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(" + ".join(part.source for part in parts))
        for part in parts:
            for name in _SUMMED:
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
            for total, counts in ((whole.drops, part.drops), (whole.formats, part.formats)):
                for name, count in counts.items():
                    total[name] = total.get(name, 0) + count
            for name, found in part.values.items():
                known = whole.values.get(name)
                whole.values[name] = _added(known, found) if known else dict(found)
            whole.notes += [note for note in part.notes if note not in whole.notes]
        return whole

    def lines(self) -> list[str]:
        """Return a report of a few short lines to print."""
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        lines = [f"{self.source}: {self.rows:,} rows, {self.kept:,} kept ({formats})"]
        if self.drops:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.drops.items())
            lines.append(f"dropped {self.dropped:,}: {reasons} (listed in dropped_rows.jsonl)")
        if self.prompts_cut or self.responses_cut:
            lines.append(
                f"cut to length: {self.prompts_cut:,} prompts, {self.responses_cut:,} answers, "
                f"{self.tokens_cut:,} tokens in all"
            )
        held = f", {self.evaluation_examples:,} held out" if self.evaluation_examples else ""
        lines.append(f"{self.examples:,} examples{held}, {self.tokens:,} tokens")
        return lines + self.notes


def _added(known: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Return the counts of two groups of numbers together."""
    return {
        "rows": known["rows"] + more["rows"],
        "sum": known["sum"] + more["sum"],
        "min": min(known["min"], more["min"]),
        "max": max(known["max"], more["max"]),
    }


@contextmanager
def dropped_rows(folder: Path) -> Iterator[TextIO]:
    """Make the list of dropped rows in a folder of tables, for `Drops`."""
    path = folder / "dropped_rows.jsonl"
    with around("dropped.make"), path.open("w", encoding="utf-8") as out:
        yield out


class Drops:
    """Counts and lists dropped rows as they come.

    Args:
        out: `dropped_rows.jsonl`, open for writing.
        report: where they are counted.
    """

    def __init__(self, out: TextIO, report: DataReport):
        self._out, self.report = out, report
        self._counts: Counter[str] = Counter()
        self._first: list[Dropped] = []

    def add(self, dropped: Dropped) -> None:
        """Count and list one row."""
        entry = {"origin": dropped.origin, "reason": dropped.reason}
        with around("dropped.write"):
            self._out.write(json.dumps(entry) + "\n")
        self._counts[dropped.kind] += 1
        if len(self._first) < _SHOWN:
            self._first.append(dropped)

    def settle(self, max_dropped: float) -> None:
        """Put the counts into the report, and judge them.

        Raises:
            DataError: no row is left, or more than `max_dropped` of them were dropped for their
                content. Empty documents cost nothing and are not held against a source.
        """
        report = self.report
        report.drops = dict(sorted(self._counts.items()))
        report.kept = report.rows - report.dropped
        report.formats = dict.fromkeys(report.formats, report.kept)
        counts = ", ".join(f"{count} {reason}" for reason, count in report.drops.items())
        reasons: dict[str, str] = {}  # the first row of each: the same reason five times says less
        for dropped in self._first:
            reasons.setdefault(dropped.reason, dropped.origin)
        first = "; ".join(f"{origin} ({reason})" for reason, origin in reasons.items())
        if report.rows == 0:
            raise DataError(f"{report.source}: holds no rows")
        if report.kept == 0:
            raise DataError(
                f"{report.source}: all {report.rows} rows are bad: {counts}. First: {first}"
            )
        content = report.dropped_for_content
        if content > max_dropped * report.rows:
            raise DataError(
                f"{report.source}: {content} of {report.rows} rows "
                f"({content / report.rows:.1%}) are bad in content, more than "
                f"max_dropped {max_dropped:.1%}: {counts}. First: {first}. "
                "Fix them or raise max_dropped"
            )
