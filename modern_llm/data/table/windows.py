"""Windows of a stream: token tables of a fixed number of examples, made one after the other.

For sources larger than the disk. A window begins where the one before ended, at a row of the
source, so that it is made again from there without tokenizing what comes before. After the last
row the source is read again from its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import DataError, StorageError
from modern_llm.data.encode.pipeline import Item, Recipe
from modern_llm.data.read.records import Broken, ContentFault, Dropped
from modern_llm.data.read.sources import LocalFiles
from modern_llm.data.table.counts import DataReport, Drops, dropped_rows
from modern_llm.data.table.iterate import FELL_BACK, RowReader, WeightedSource, share_of
from modern_llm.data.table.token_table import TokenTable, TokenTableWriter
from modern_llm.storage.atomic import new_folder
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_text

ROWS_AT_ONCE = 1000
"""Rows that are tokenized together, some of them for the next window."""


@dataclass(frozen=True)
class Start:
    """Place at which a window begins, in the run and in the source."""

    number: int = 0
    step: int = 0
    """Optimizer steps of all windows before."""
    examples: int = 0
    """Examples of all windows before."""
    epoch: int = 0
    """Epochs of the source before this one."""
    row: int = 0
    """First row of the source."""
    skip: int = 0
    """Examples of that row that belong to the window before."""
    epoch_steps: int = 0
    """Optimizer steps of a pass, 0 in the first one."""


@dataclass(frozen=True)
class Window:
    """One window: its examples, where it begins, and where the next one does."""

    start: Start
    after: Start
    table: TokenTable
    report: DataReport

    @classmethod
    def open(cls, folder: Path) -> Window:
        """Map the table of a window.

        Raises:
            StorageError: the folder holds no whole window.
        """
        try:
            facts = json.loads(read_text(folder / "window.json"))
            start, after = Start(**facts["start"]), Start(**facts["after"])
            report = DataReport.from_dict(facts["report"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(
                f"{folder}: no whole window of the data ({error}): run again to make it again"
            ) from error
        return cls(start, after, TokenTable.open(folder / "train"), report)


class _Example(NamedTuple):
    """One example of a row, or the reason why it is none."""

    row: int
    number: int
    """Examples of the same row before it."""
    origin: str
    cells: Any
    numbers: Any
    dropped: Dropped | None


class WindowReader:
    """Writes the windows of one source in order.

    Args:
        size: examples of a window.
        batch_size: examples of an optimizer step, of which a window has a whole number.
        check: called for every `ROWS_AT_ONCE` rows; what it raises ends the reading.
        start: of the first window to write.
    """

    def __init__(
        self,
        config: DatasetConfig,
        recipe: Recipe,
        part: WeightedSource,
        size: int,
        batch_size: int,
        start: Start,
        check: Callable[[], None],
    ):
        self._config, self._source, self._check = config, part.source, check
        self._recipe = recipe if part.format is None else replace(recipe, name=part.format)
        self._batch, self._size = batch_size, -(-size // batch_size) * batch_size
        self.start = start
        self._reader = RowReader(self._recipe)
        self._examples = self._read(start.row, start.skip)

    def make(self, folder: Path) -> Start:
        """Write the window at `start` into a folder of its own, and return the next one's start.

        Raises:
            DataError: a row is broken, or too many were dropped for their content.
            StorageError: the folder cannot be written.
        """
        with new_folder(folder) as new:
            with dropped_rows(new) as out:
                drops = Drops(out, DataReport(self._source.name))
                recipe = self._recipe
                with TokenTableWriter(new / "train", recipe.columns, recipe.stored) as writer:
                    after = self._fill(writer, None, drops)
            facts = {
                "start": asdict(self.start),
                "after": asdict(after),
                "report": drops.report.as_dict(),
            }
            with around("prepared.write"):
                (new / "window.json").write_text(json.dumps(facts), encoding="utf-8")
        self.start = after
        return after

    def write_held_out(self, folder: Path) -> DataReport:
        """Write the rows of the first window that `eval_fraction` holds out into a table.

        Raises:
            DataError: there are none.
        """
        with new_folder(folder) as new:
            with dropped_rows(new) as out:
                drops = Drops(out, DataReport(self._source.name))
                recipe = self._recipe
                with TokenTableWriter(new / "evaluation", recipe.columns, recipe.stored) as held:
                    self._fill(None, held, drops)
            if not held.rows:
                raise DataError(
                    f"{self._source.name}: data.eval_fraction {self._config.eval_fraction} of the "
                    f"first window of {self._size} examples holds out none: raise it or "
                    "data.streaming_window, or name evaluation data"
                )
        return drops.report

    def _fill(
        self, train: TokenTableWriter | None, held: TokenTableWriter | None, drops: Drops
    ) -> Start:
        """Take the examples of one window; return where the next one begins."""
        report, fraction = drops.report, self._config.eval_fraction
        cuts = self._recipe.cuts
        before = (cuts.prompts, cuts.responses, cuts.tokens)
        count, at = 0, (self.start.row, self.start.skip)
        while count < self._size:
            example = next(self._examples, None)
            if example is None:
                if count or (self.start.row, self.start.skip) == (0, 0):
                    break
                # The pass ended with the window before, or no more row of it is good.
                start, steps = self.start, self.start.epoch_steps or self.start.step
                self.start = replace(start, epoch=start.epoch + 1, row=0, skip=0, epoch_steps=steps)
                self._again()
                continue
            at = (example.row, example.number + 1)
            report.rows += 1
            if example.dropped is not None:
                drops.add(example.dropped)
            elif fraction is not None and self._share(example) < fraction:
                report.evaluation_examples += 1
                if held is not None:
                    held.add(example.cells, example.origin, example.numbers)
            else:
                count += 1
                report.count(example.numbers)
                if train is not None:
                    train.add(example.cells, example.origin, example.numbers)
        report.examples, report.tokens = count, 0 if train is None else train.tokens
        report.prompts_cut = cuts.prompts - before[0]
        report.responses_cut = cuts.responses - before[1]
        report.tokens_cut = cuts.tokens - before[2]
        self._settle(drops, whole=count == self._size)
        return self._after(count, at)

    def _after(self, count: int, at: tuple[int, int]) -> Start:
        start, ended = self.start, count < self._size
        epoch, row, skip = start.epoch, *at
        last = start.step + -(-count // self._batch)
        epoch_steps = start.epoch_steps
        if ended:
            epoch, row, skip, epoch_steps = epoch + 1, 0, 0, epoch_steps or last
            self._again()
        return Start(
            start.number + 1,
            last,
            start.examples + count,
            epoch,
            row,
            skip,
            epoch_steps,
        )

    def _again(self) -> None:
        """Begin another pass over the source."""
        self._reader = RowReader(self._recipe)
        self._examples = self._read(0, 0)

    def _share(self, example: _Example) -> float:
        return share_of(example.cells[: self._recipe.held_out_by])

    def _settle(self, drops: Drops, *, whole: bool) -> None:
        """Judge the dropped rows of a window; a short one at the end of a pass says too little."""
        report, reader = drops.report, self._reader
        report.formats = {reader.format.name: 0} if reader.format else {}
        if self._recipe.fell_back and reader.saw_chat:
            report.notes.append(FELL_BACK)
        report.notes += self._recipe.remarks()
        report.notes += getattr(self._source, "notes", ())
        first = (self.start.row, self.start.skip) == (0, 0)
        drops.settle(self._config.max_dropped if whole or first else 1.0)
        if not report.examples:
            raise DataError(
                f"{self._source.name}: data.eval_fraction {self._config.eval_fraction} of "
                f"{report.kept} rows leaves none to train on: lower it"
            )

    def _read(self, row: int, skip: int) -> Iterator[_Example]:
        """Yield the examples of the source from row `row` on, without its first `skip`."""
        waiting: list[tuple[int, list[Item] | Dropped]] = []
        settled = False
        for number, values in enumerate(islice(self._source, self._config.max_examples)):
            if number % ROWS_AT_ONCE == 0:
                self._check()
            # The first good row decides the format, wherever the reading begins.
            if number < row and settled:
                continue
            outcome = self._reader(values)
            if isinstance(outcome, Broken):
                if self._config.on_bad_row == "error" and number >= row:
                    raise DataError(f"{outcome} (fix it, or on_bad_row: skip drops such rows)")
                outcome = outcome.dropped()
            settled = settled or isinstance(outcome, list)
            if number < row:
                continue
            waiting.append((number, outcome))
            if len(waiting) >= ROWS_AT_ONCE:
                yield from self._encoded(waiting, row, skip)
                waiting = []
        yield from self._encoded(waiting, row, skip)

    def _encoded(
        self, waiting: list[tuple[int, list[Item] | Dropped]], row: int, skip: int
    ) -> Iterator[_Example]:
        """Yield the examples of some rows, tokenized together."""
        recipe = self._recipe
        items = [item for _, found in waiting if isinstance(found, list) for item in found]
        ids = iter(recipe.encoder([text for item in items for text in item.texts]))
        for number, found in waiting:
            if isinstance(found, Dropped):
                if number > row or not skip:
                    yield _Example(number, 0, found.origin, None, None, found)
                continue
            for at, item in enumerate(found):
                mine = [next(ids) for _ in item.texts]
                cells = dropped = None
                try:
                    cells = recipe.cells(recipe.split(item, mine))
                except ContentFault as fault:
                    dropped = Dropped(item.origin, str(fault), str(fault))
                if number > row or at >= skip:
                    yield _Example(number, at, item.origin, cells, item.numbers, dropped)


def stream_identity(part: WeightedSource) -> list[str]:
    """Return what names the content of a source without reading it: the name and size of every
    local file, or the commit of a data set of the Hub."""
    source = getattr(part.source, "source", part.source)
    if isinstance(source, LocalFiles):
        return [f"{path.name} {path.stat().st_size}" for path in source.files]
    return source.identity
