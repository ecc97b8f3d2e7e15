"""One pass over the sources of a section: open them, read rows, check them, group them.

The common part of `prepare`, which writes tables, and `examine`, which measures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import isnan

from modern_llm.config.data import DatasetConfig, DocumentDatasetConfig
from modern_llm.config.errors import DataError, UserError
from modern_llm.data.encode.pipeline import Item, Recipe
from modern_llm.data.encode.tokenizer import Ids
from modern_llm.data.read.columns import number_in
from modern_llm.data.read.conversations import with_earlier_answers
from modern_llm.data.read.formats import DOCUMENT, Format, Mode, Record, choose_format
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import Broken, ContentFault, Dropped, RowFault
from modern_llm.data.read.renamed import RenamedColumns
from modern_llm.data.read.sources import Source, open_source
from modern_llm.data.read.values import Columns
from modern_llm.data.table.counts import Drops

_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2**23
_COUNTED_AFTER_BROKEN = 100_000
_MOST_COLUMNS = 1000
FELL_BACK = (
    "the tokenizer has no chat template: messages are written as <|user|> and <|assistant|> turns "
    "(set template to change that)"
)


@dataclass(frozen=True)
class WeightedSource:
    """One training source with its weight; `format` is None to use the section's."""

    source: Source | RenamedColumns
    weight: float = 1.0
    format: str | None = None

    def times(self, cells: Sequence[Ids]) -> int:
        """Return how often an example occurs in an epoch, by weight and content alone."""
        whole = int(self.weight)
        rest = self.weight - whole
        return whole + (rest > 0 and share_of(cells, b"weight") < rest)


def training_sources(config: DatasetConfig) -> list[WeightedSource]:
    """Return the training sources of a section.

    Raises:
        UserError: it names nothing.
        DataError: something that it names is not there.
    """
    if config.sources is None:
        if config.dataset_name is None:
            raise UserError("dataset_name is missing: give a Hub id, or a local file or folder")
        return [WeightedSource(_open(config, config.dataset_name, config.split, config.subset))]
    return [
        WeightedSource(
            _open(config, part.dataset_name, part.split, part.subset, part.columns),
            part.weight,
            None if part.format == "auto" else part.format,
        )
        for part in config.sources
    ]


def evaluation_source(config: DatasetConfig) -> Source | RenamedColumns | None:
    """Return the source to evaluate on, where that is another than the one to train on."""
    if config.eval_dataset_name is not None:
        return _open(config, config.eval_dataset_name, config.eval_split, None, evaluation=True)
    if config.eval_split is None:
        return None
    assert config.dataset_name is not None, "eval_split alone was refused beside sources"
    return _open(config, config.dataset_name, config.eval_split, config.subset)


def _open(
    config: DatasetConfig,
    name: str,
    split: str | None,
    subset: str | None,
    columns: dict[str, str] | None = None,
    *,
    evaluation: bool = False,
) -> Source | RenamedColumns:
    documents = isinstance(config, DocumentDatasetConfig)
    columns = columns or config.columns
    source = open_source(
        name,
        split=split,
        subset=subset,
        text_column=config.text_column if documents else None,
        evaluation=evaluation,
        streaming=getattr(config, "streaming", False),
    )
    return RenamedColumns(source, columns) if columns else source


def read_items(
    source: Iterable[Row | Broken], config: DatasetConfig, recipe: Recipe, drops: Drops
) -> Iterator[Item]:
    """Yield the texts of every good row. Broken rows are dropped, or counted and then refused.

    Raises:
        DataError: the first broken row with its place, and how many there are.
    """
    report = drops.report
    reader = RowReader(recipe)
    first: Broken | None = None
    broken = stop = 0
    for row in islice(source, config.max_examples):
        report.rows += 1
        outcome = reader(row)
        if isinstance(outcome, Broken):
            if config.on_bad_row == "skip":
                drops.add(outcome.dropped())
                continue
            if first is None:
                first, stop = outcome, report.rows + _COUNTED_AFTER_BROKEN
            broken += 1
        elif isinstance(outcome, Dropped):
            drops.add(outcome)
        elif first is None:
            report.rows += len(outcome) - 1  # a pair may become two examples
            yield from outcome
        if report.rows == stop:
            break
    if first is not None:
        among = f"{broken} broken of {report.rows} rows read"
        raise DataError(f"{first} ({among}; fix them, or on_bad_row: skip drops such rows)")
    report.formats = {reader.format.name: 0} if reader.format else {}
    if recipe.fell_back and reader.saw_chat:
        report.notes.append(FELL_BACK)
    report.notes += recipe.remarks()
    if unread := sorted(reader.unread):
        names = ", ".join(map(repr, unread[:20])) + (", ..." if len(unread) > 20 else "")
        report.notes.append(f"{report.source}: columns that are not read: {names}")


class RowReader:
    """Converter of rows to items or dropped rows; the first row that fits decides the format."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._records = RecordReader(
            recipe.formats, recipe.name, recipe.mode, recipe.numbers, whole=recipe.whole
        )
        self.saw_chat = False

    @property
    def unread(self) -> set[str]:
        """The columns that no format function asked for."""
        return self._records.unread

    @property
    def format(self) -> Format | None:
        """The format of the rows, once one fitted."""
        return self._records.format

    def __call__(self, row: Row | Broken) -> list[Item] | Broken | Dropped:
        if isinstance(row, Broken):
            return row
        try:
            records = self._recipe.records(self._records(row))
            items = [self._recipe.item(record) for record in records]
        except RowFault as fault:
            return Broken(row.origin, str(fault))
        except ContentFault as fault:
            return Dropped(row.origin, str(fault), str(fault))
        self.saw_chat = self.saw_chat or any(item.chat for item in items)
        return items


class RecordReader:
    """Converter of rows to records.

    `format` is that of the first row that fits one; `unread` lists the columns with a value that no
    format function read.

    A column that is null is read as an absent one, because Arrow has no absent columns. Where that
    gives no record the row is read with its nulls, so that a fault names them.

    Args:
        numbers: column of numbers -> value of a source without it, NaN where every source must have
            it; a source has each in all of its rows or in none.
        whole: whether every turn of the assistant is trained on.
    """

    def __init__(
        self,
        formats: Sequence[Format],
        name: str,
        mode: Mode = "convert",
        numbers: Mapping[str, float] | None = None,
        *,
        whole: bool = False,
    ):
        self._formats, self._name, self._mode, self._whole = formats, name, mode, whole
        self._numbers = dict(numbers or {})
        self._present: frozenset[str] | None = None
        self.format: Format | None = None
        self.unread: set[str] = set()

    def __call__(self, row: Row) -> Record:
        first = self.format is None
        try:
            return self._read(row)
        except RowFault:
            pass
        except ContentFault:
            if not first:
                raise
        if first:
            self.format = None
        return self._read(row, nulls=True)

    def _read(self, row: Row, *, nulls: bool = False) -> Record:
        # A document is text, whatever its words are.
        literal = self._name == DOCUMENT
        values = Columns(row.values, nulls=nulls, literal=literal, whole=self._whole)
        if self.format is None:
            self.format = choose_format(self._formats, self._name, values)
        record = self.format.function(self._mode)(values, row.origin)
        if self._whole:
            record = with_earlier_answers(record)
        if self._numbers:
            record = self._with_numbers(record, values)
        if len(self.unread) < _MOST_COLUMNS:
            self.unread |= values.unread()
        return record

    def _with_numbers(self, record: Record, values: Columns) -> Record:
        """Return the record with the numbers of its row; the first row decides which there are."""
        wanted = self._present
        if wanted is None:
            wanted = frozenset(n for n, d in self._numbers.items() if n in values or isnan(d))
        found = {
            name: number_in(values, name, negative=isnan(default))
            for name, default in self._numbers.items()
            if name in wanted
        }
        for name in self._numbers:
            if name not in wanted and name in values and values[name] is not None:
                raise RowFault(
                    f"column {name!r} is missing in the rows before: give it in every row of the "
                    "source or in none (data.pair_values: [] reads no such column)"
                )
        self._present = wanted
        known = getattr(record, "numbers", None) or {}
        return replace(record, numbers={**known, **found}) if found else record


def in_batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield groups large enough to keep all cores busy and small enough to hold in memory."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += sum(map(len, item.parts.columns if item.parts else item.texts))
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def share_of(cells: Sequence[Ids], salt: bytes = b"") -> float:
    """Return a number in [0, 1) drawn from the content of a row alone.

    Rows below a fraction are held out: adding rows, or another order, moves none of them, and equal
    rows stay on one side. Another `salt` gives an independent number.
    """
    digest = hashlib.blake2b(digest_size=8, salt=salt)
    for ids in cells:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4", copy=False).tobytes())
    return int.from_bytes(digest.digest(), "little") / 2**64
