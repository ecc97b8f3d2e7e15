"""Statistics of a data section before a run: the numbers of `modern-llm inspect`.

One pass over each source through the readers, formats, templates and truncation of training.
Nothing is written, and only a few examples keep their text. `examine` returns counts and lengths;
`findings` (in `warnings`) turns them into warnings. Training stops at a broken row; this pass
counts it and continues, so that one run lists everything to fix.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.data import DatasetConfig
from modern_llm.data.encode.kinds import RESPONSES
from modern_llm.data.encode.pipeline import Item, Recipe
from modern_llm.data.encode.tokenizer import Ids
from modern_llm.data.inspect.token_lines import Sink
from modern_llm.data.read.formats import Format
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import Broken, ContentFault, Dropped, RowFault
from modern_llm.data.read.sources import Source
from modern_llm.data.table.counts import DataReport, Drops
from modern_llm.data.table.gaps import Cells
from modern_llm.data.table.iterate import (
    RecordReader,
    WeightedSource,
    evaluation_source,
    in_batches,
    read_items,
    share_of,
    training_sources,
)
from modern_llm.data.table.token_table import STARTS

# Columns in which published preference sets keep the two judgements: equal ones are a tie.
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("score_A", "score_B"),
)


@dataclass
class Examined:
    """Numbers of one source.

    Attributes:
        report: as training makes it, with broken rows dropped instead of refused.
        format, why: how rows are read, and the columns that decided it.
        columns: prompt and answers, or text.
        whole: column -> tokens of every kept row before truncation, end tokens not counted.
        kept: column -> tokens after truncation, end tokens included.
        trained: column -> tokens of them that are trained on, of a prompt all.
        cut: column -> rows that truncation shortened.
        unended: answer column -> rows that do not close with an end token.
        held_out: per kept row, whether `eval_fraction` keeps it for evaluation.
        prompts, pairs, swapped: per kept row a 64-bit digest of the prompt, of the whole row, and
            of the row with its two answers exchanged.
        score_ties: rows whose two scores are equal, where the source has scores.
        examples: (origin, cells) of a few rows, chosen by content.
    """

    name: str
    role: str
    weight: float
    report: DataReport
    columns: tuple[str, ...]
    format: str = ""
    why: str = ""
    whole: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    kept: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    trained: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    unended: dict[str, int] = field(default_factory=dict)
    held_out: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    prompts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pairs: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    swapped: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    score_ties: int = 0
    examples: list[tuple[str, list[Ids]]] = field(default_factory=list)


def examine(
    config: DatasetConfig,
    recipe: Recipe,
    *,
    examples: int = 3,
    sink: Sink | None = None,
) -> list[Examined]:
    """Return the numbers of every training source, and of the evaluation source if there is one.

    Args:
        sink: called with the cells and the origin of every row that would be trained on.

    Raises:
        DataError: a source cannot be read, or holds no row that can be used.
    """
    tolerant = replace(config, on_bad_row="skip", max_dropped=1.0)
    found = []
    for part in training_sources(tolerant):
        found.append(_Tally(part, "train", recipe, examples, sink).run(tolerant))
    if (source := evaluation_source(tolerant)) is not None:
        whole = replace(tolerant, eval_fraction=None)
        found.append(_Tally(WeightedSource(source), "evaluation", recipe, examples).run(whole))
    return found


class _Noting:
    """The rows of a source, unchanged, with notes on properties that only raw rows have."""

    def __init__(self, source: Source, recipe: Recipe):
        self._source = source
        self._record_of = RecordReader(recipe.formats, recipe.name, recipe.mode, whole=recipe.whole)
        self.format: Format | None = None
        self.found: tuple[str, ...] = ()
        self.ties = 0

    def __iter__(self) -> Iterator[Row | Broken]:
        names: tuple[str, str] | None = None
        for row in self._source:
            if isinstance(row, Row):
                if self.format is None:
                    names = self._first(row)
                if names is not None:
                    a, b = (row.values.get(name) for name in names)
                    self.ties += a is not None and a == b
            yield row

    def _first(self, row: Row) -> tuple[str, str] | None:
        with suppress(RowFault, ContentFault):
            self._record_of(row)
        self.format = self._record_of.format
        if self.format is None:
            return None
        self.found = tuple(sorted(row.values))
        return next((s for s in SCORES if all(name in row.values for name in s)), None)


class _Tally:
    """Counts one source."""

    def __init__(
        self,
        part: WeightedSource,
        role: str,
        recipe: Recipe,
        examples: int,
        sink: Sink | None = None,
    ):
        self._sink = sink
        if part.format is not None:
            recipe = replace(recipe, name=part.format)
        source = part.source
        self._source, self._recipe, self._wanted = source, recipe, examples
        columns = tuple(name for name in recipe.columns if name != STARTS)
        report = DataReport(source.name, notes=list(getattr(source, "notes", ())))
        self._result = Examined(source.name, role, part.weight, report, columns)
        self._whole: list[array] = [array("q") for _ in columns]
        self._kept: list[array] = [array("q") for _ in columns]
        self._trained: list[array] = [array("q") for _ in columns]
        self._digests = {name: array("q") for name in ("prompts", "pairs", "swapped")}
        self._held = array("b")
        self._cut: Counter[str] = Counter()
        self._unended: Counter[str] = Counter()
        self._examples: list[tuple[int, str, list[Ids]]] = []

    def run(self, config: DatasetConfig) -> Examined:
        """Read the source to its end."""
        recipe, result = self._recipe, self._result
        rows = _Noting(self._source, recipe)
        drops = Drops(StringIO(), result.report)
        for batch in in_batches(read_items(rows, config, recipe, drops)):
            ids = iter(recipe.encoder([text for item in batch for text in item.texts]))
            for item in batch:
                self._row(item, [next(ids) for _ in item.texts], drops, config)
        drops.settle(config.max_dropped)
        self._finish(rows)
        return result

    def _row(self, item: Item, whole: list[Ids], drops: Drops, config: DatasetConfig) -> None:
        try:
            parts = self._recipe.split(item, whole)
            cells = self._recipe.cells(parts)
        except ContentFault as fault:
            drops.add(Dropped(item.origin, str(fault), str(fault)))
            return
        columns, whole = self._result.columns, parts.columns
        closing, fraction = (None, *parts.ends), config.eval_fraction
        for at, name in enumerate(columns):
            present = at < len(whole)  # a ranking may have fewer responses than another
            self._whole[at].append(len(whole[at]) if present else 0)
            self._kept[at].append(len(cells[at]))
            mask = parts.trained[at - 1] if at and present and parts.trained else None
            self._trained[at].append(self._whole[at][-1] if mask is None else int(mask.sum()))
            if len(columns) > 1 and present:
                ends = {*self._recipe.ends, closing[at]}
                ended = len(cells[at]) > 0 and int(cells[at][-1]) in ends
                # An answer of exactly the room there is loses its end token alone.
                lost = at > 0 and closing[at] is not None and not ended
                self._cut[name] += lost or len(cells[at]) < len(whole[at])
                known = bool(self._recipe.ends)  # without a tokenizer no token is an end token
                self._unended[name] += at > 0 and known and not ended
        texts = [_digest(ids) for ids in whole]
        pair = _mixed(texts)
        self._digests["prompts"].append(texts[0])
        self._digests["pairs"].append(pair)
        self._digests["swapped"].append(_mixed([texts[0], *texts[:0:-1]]))
        held = fraction is not None and share_of(cells[: self._recipe.held_out_by]) < fraction
        self._held.append(held)
        self._result.report.count(item.numbers)
        if self._sink is not None and not held:
            self._sink(cells, item.origin, item.numbers)
        kept = Cells(np.array(ids) for ids in cells)
        kept.gaps = getattr(cells, "gaps", ())
        entry = (-pair, item.origin, kept)
        if len(self._examples) < self._wanted:
            heapq.heappush(self._examples, entry)
        elif self._wanted and entry[0] > self._examples[0][0]:
            heapq.heapreplace(self._examples, entry)

    def _finish(self, rows: _Noting) -> None:
        result, report = self._result, self._result.report
        report.note_values()
        assert rows.format is not None, "a source without a readable row was refused before"
        result.format = rows.format.name
        result.why = f"its rows have {', '.join(rows.found)}; wanted {rows.format.columns}"
        for at, name in enumerate(result.columns):
            result.whole[name] = np.frombuffer(self._whole[at], np.int64)
            result.kept[name] = np.frombuffer(self._kept[at], np.int64)
            result.trained[name] = np.frombuffer(self._trained[at], np.int64)
        result.cut, result.unended = dict(self._cut), dict(self._unended)
        unused = {name for name in RESPONSES[2:] if not result.kept.get(name, np.zeros(0)).any()}
        result.columns = tuple(name for name in result.columns if name not in unused)
        for name, values in self._digests.items():
            setattr(result, name, np.frombuffer(values, np.int64))
        result.held_out = np.frombuffer(self._held, np.int8).astype(bool)
        result.score_ties = rows.ties
        report.tokens = int(sum(values.sum() for values in result.kept.values()))
        report.evaluation_examples = int(result.held_out.sum())
        report.examples = len(result.pairs) - report.evaluation_examples
        result.examples = [(origin, cells) for _, origin, cells in sorted(self._examples)[::-1]]


def _digest(ids: Ids) -> int:
    raw = hashlib.blake2b(ids.tobytes(), digest_size=8).digest()
    return int.from_bytes(raw, "little", signed=True)


def _mixed(parts: Sequence[int]) -> int:
    raw = b"".join(part.to_bytes(8, "little", signed=True) for part in parts)
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little", signed=True)


def shared_rows(train: Sequence[Examined], evaluation: Sequence[Examined]) -> dict[str, int]:
    """Return how many evaluation rows are also in the training data: those with the same prompt,
    and those with the same prompt and answers (in either order)."""

    def column(name: str, held: bool) -> NDArray[np.int64]:
        parts = [getattr(e, name)[e.held_out == held] for e in train]
        if held:
            parts += [getattr(e, name) for e in evaluation]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    seen = np.concatenate([column("pairs", False), column("swapped", False)])
    return {
        "evaluation_rows": len(column("pairs", True)),
        "same_prompt": int(np.isin(column("prompts", True), column("prompts", False)).sum()),
        "same_pair": int(np.isin(column("pairs", True), seen).sum()),
    }


def summary_of(values: NDArray[np.int64]) -> dict[str, Any]:
    """Return mean, percentiles, maximum and a histogram of lengths, as JSON can hold them."""
    if not len(values):
        return {"count": 0}
    points = np.percentile(values, [5, 25, 50, 75, 95, 99])
    names = ("p5", "p25", "p50", "p75", "p95", "p99")
    # Up to the 99th percentile: one row of ten thousand tokens would press all others into one bar.
    top = max(int(points[-1]), 1)
    counts, edges = np.histogram(np.minimum(values, top), bins=24, range=(0, top))
    return {
        "count": len(values),
        "mean": round(float(values.mean()), 2),
        **{name: round(float(point), 1) for name, point in zip(names, points, strict=True)},
        "max": int(values.max()),
        "histogram": {"counts": counts.tolist(), "edges": [round(float(e), 1) for e in edges]},
    }
