"""From a data section to token tables on disk: read, judge, tokenise, hold out, write; or reuse.

One pass in batches, so that memory does not grow with the data. A folder that already holds the
tables of the same bytes, tokenizer and settings is mapped as it is. When anything fails nothing is
left. On a machine with several processes the caller lets one of them build first. Called by the
three `*_datasets` modules, which choose the recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from modern_llm.config.data import DatasetConfig, DocumentDatasetConfig
from modern_llm.config.errors import DataError, StorageError, UserError
from modern_llm.data.formats import Format, Values, choose_format
from modern_llm.data.readers import Row
from modern_llm.data.recipes import Item, Recipe, RowPacker, formats_of
from modern_llm.data.records import Broken, ContentFault, Document, Dropped, RowFault
from modern_llm.data.report import DataReport, Drops
from modern_llm.data.sources import Source, open_source
from modern_llm.data.storage import new_folder
from modern_llm.data.templates import Tokenizer
from modern_llm.data.tokenize import Cuts, Ids, tokenizer_identity
from modern_llm.data.tokens import TokenTable, TokenTableWriter

VERSION = 1
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2**23
_COUNTED_AFTER_BROKEN = 100_000
FELL_BACK = (
    "the tokenizer has no chat template: messages are written as <|user|> and <|assistant|> turns "
    "(set template to change that)"
)


@dataclass(frozen=True)
class Prepared:
    """The tables of a section.

    `evaluation` is None where the section names no evaluation data; `evaluation_report` is there
    where that comes from a source of its own.
    """

    train: TokenTable
    evaluation: TokenTable | None
    report: DataReport
    evaluation_report: DataReport | None = None


def prepare(config: DatasetConfig, tokenizer: Tokenizer, folder: Path, recipe: Recipe) -> Prepared:
    """Return the tables of a section from `folder`, building them there unless they are up to date.

    Raises:
        DataError: a source cannot be read, is broken, or leaves nothing to train or evaluate on.
        StorageError: the folder cannot be written.
    """
    source, evaluation = _training_source(config), _evaluation_source(config)
    key = _key(config, tokenizer, recipe, source, evaluation)
    if (found := _reuse(folder, key)) is not None:
        return found
    with new_folder(folder) as new:
        with (new / "dropped_rows.jsonl").open("w", encoding="utf-8") as out:
            build = _Build(config, recipe, new)
            report = build.source(source, Drops(out, DataReport(source.name)), "train")
            other = None
            if evaluation is not None:
                drops = Drops(out, DataReport(evaluation.name))
                other = build.source(evaluation, drops, "evaluation")
        summary = {
            "key": key,
            "report": report.as_dict(),
            "evaluation_report": other and other.as_dict(),
        }
        (new / "prepared.json").write_text(json.dumps(summary), encoding="utf-8")
    found = _reuse(folder, key)
    if found is None:
        raise StorageError(
            f"{folder}: another process keeps writing other data here: give each its own"
        )
    return found


def sample_texts(config: DatasetConfig, count: int = 64) -> list[str]:
    """Return the texts of the first `count` rows that are good, to compare tokenizers on."""
    source = _training_source(config)
    formats, name = formats_of(config)
    texts: list[str] = []
    for row in islice(source, count):
        try:
            if isinstance(row, Row):
                record = choose_format(formats, name, row.values).convert(row.values, row.origin)
                texts += _texts(record)
        except (RowFault, ContentFault):
            continue
    return texts


def _texts(record: Any) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    prompt = record.prompt
    turns = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [*turns, *record.responses]


def _training_source(config: DatasetConfig) -> Source:
    if config.dataset_name is None:
        raise UserError("dataset_name is missing: give a Hub id, or a local file or folder")
    return open_source(
        config.dataset_name,
        split=config.split,
        subset=config.subset,
        text_column=_text_column(config),
    )


def _evaluation_source(config: DatasetConfig) -> Source | None:
    """The source to evaluate on, where that is another than the one to train on."""
    if config.eval_dataset_name is not None:
        return open_source(
            config.eval_dataset_name,
            split=config.eval_split,
            text_column=_text_column(config),
            evaluation=True,
        )
    if config.eval_split is None:
        return None
    return open_source(
        config.dataset_name,
        split=config.eval_split,
        subset=config.subset,
        text_column=_text_column(config),
    )


def _text_column(config: DatasetConfig) -> str | None:
    return config.text_column if isinstance(config, DocumentDatasetConfig) else None


def _key(
    config: DatasetConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    source: Source,
    evaluation: Source | None,
) -> str:
    """Digest of everything that the tables depend on."""
    parts = {
        "version": VERSION,
        "section": [type(config).__name__, asdict(config)],
        "settings": recipe.settings,
        "tokenizer": tokenizer_identity(tokenizer),
        "sources": [source.identity, evaluation and evaluation.identity],
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _reuse(folder: Path, key: str) -> Prepared | None:
    """The tables in `folder` if they are whole and have this key."""
    try:
        summary = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        if summary["key"] != key:
            return None
        report = DataReport.from_dict(summary["report"])
        other = summary["evaluation_report"]
        held_out = other is not None or report.evaluation_examples
        return Prepared(
            train=TokenTable.open(folder / "train"),
            evaluation=TokenTable.open(folder / "evaluation") if held_out else None,
            report=report,
            evaluation_report=other and DataReport.from_dict(other),
        )
    except (OSError, ValueError, KeyError, TypeError, StorageError):
        return None


class _Build:
    """One pass over each source of a section."""

    def __init__(self, config: DatasetConfig, recipe: Recipe, folder: Path):
        self._config, self._recipe, self._folder = config, recipe, folder

    def source(self, source: Source, drops: Drops, name: str) -> DataReport:
        """Write the table `name` (and `evaluation`, if a fraction is held out) from one source."""
        config, recipe, report = self._config, self._recipe, drops.report
        fraction = config.eval_fraction
        recipe.cuts.clear()
        with ExitStack() as stack:
            sinks = {
                table: _Sink(
                    stack.enter_context(TokenTableWriter(self._folder / table, recipe.columns)),
                    recipe.row_length,
                )
                for table in ([name] if fraction is None else [name, "evaluation"])
            }
            for cells, origin in self._rows(source, drops):
                held_out = fraction is not None and share_of(cells) < fraction
                sinks["evaluation" if held_out else name].add(cells, origin)
            drops.settle(config.max_dropped)
            self._fill_in(report, sinks, name)
        return report

    def _rows(self, source: Source, drops: Drops) -> Iterator[tuple[list[Ids], str]]:
        """Cells and origin of every row that is kept, tokenised in batches."""
        for batch in _batches(_items(source, self._config, self._recipe, drops)):
            ids = iter(self._recipe.encoder([text for item in batch for text in item.texts]))
            for item in batch:
                mine = [next(ids) for _ in item.texts]
                try:
                    yield self._recipe.cells(item, mine), item.origin
                except ContentFault as fault:
                    drops.add(Dropped(item.origin, str(fault), str(fault)))

    def _fill_in(self, report: DataReport, sinks: dict[str, _Sink], name: str) -> None:
        """Complete the report, and refuse tables without a row."""
        cuts: Cuts = self._recipe.cuts
        report.prompts_cut, report.responses_cut = cuts.prompts, cuts.responses
        report.tokens_cut = cuts.tokens + sum(sink.leftover for sink in sinks.values())
        report.tokens = sum(sink.tokens for sink in sinks.values())
        report.examples = sinks[name].rows
        if len(sinks) > 1:
            report.evaluation_examples = sinks["evaluation"].rows
        for table, sink in sinks.items():
            if sink.rows == 0:
                raise DataError(f"{report.source}: {self._nothing_in(table, sink, report)}")

    def _nothing_in(self, table: str, sink: _Sink, report: DataReport) -> str:
        use = "train" if table == "train" else "evaluate"
        length = self._recipe.row_length
        if length is not None and sink.leftover:
            return (
                f"has {sink.leftover} tokens to {use} on, fewer than one row of {length}: "
                "give more text or shorter rows"
            )
        return (
            f"eval_fraction {self._config.eval_fraction} of {report.kept} rows leaves none to "
            f"{use} on: change it, or name evaluation data"
        )


class _Sink:
    """One table being written, with documents packed into rows where a length is given."""

    def __init__(self, writer: TokenTableWriter, row_length: int | None):
        self._writer = writer
        self._packer = None if row_length is None else RowPacker(writer, row_length)
        self.add = writer.add if self._packer is None else self._packer.add

    @property
    def rows(self) -> int:
        return self._writer.rows

    @property
    def tokens(self) -> int:
        return self._writer.tokens

    @property
    def leftover(self) -> int:
        return 0 if self._packer is None else self._packer.leftover


def _items(source: Source, config: DatasetConfig, recipe: Recipe, drops: Drops) -> Iterator[Item]:
    """The texts of every good row. Broken rows are dropped, or counted and then refused.

    Raises:
        DataError: the first broken row with its place, and how many there are.
    """
    report = drops.report
    reader = _RowReader(recipe)
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
            yield outcome
        if report.rows == stop:
            break
    if first is not None:
        among = f"{broken} broken of {report.rows} rows read"
        raise DataError(f"{first} ({among}; mend them, or on_bad_row: skip drops such rows)")
    report.formats = {reader.format.name: 0} if reader.format else {}
    if recipe.fell_back and reader.saw_chat:
        report.notes.append(FELL_BACK)


class _RowReader:
    """One row to an item, or to why it is none; the first row that fits a format decides it."""

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self.format: Format | None = None
        self.saw_chat = False

    def __call__(self, row: Row | Broken) -> Item | Broken | Dropped:
        if isinstance(row, Broken):
            return row
        try:
            item = self._item(row.values, row.origin)
        except RowFault as fault:
            return Broken(row.origin, str(fault))
        except ContentFault as fault:
            return Dropped(row.origin, str(fault), str(fault))
        self.saw_chat = self.saw_chat or item.chat
        return item

    def _item(self, values: Values, origin: str) -> Item:
        recipe = self._recipe
        if self.format is None:
            self.format = choose_format(recipe.formats, recipe.name, values)
        convert = self.format.convert
        if recipe.framed and self.format.framed is not None:
            convert = self.format.framed
        return recipe.item(convert(values, origin))


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Groups that are large enough to keep all cores busy and small enough to hold in memory."""
    batch: list[Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += sum(map(len, item.texts))
        if len(batch) >= _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def share_of(cells: Sequence[Ids]) -> float:
    """Return a number in [0, 1) drawn from the content of a row alone.

    Rows below a fraction are held out: adding rows, or another order, moves none of them, and equal
    rows stay on one side.
    """
    digest = hashlib.blake2b(digest_size=8)
    for ids in cells:
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4", copy=False).tobytes())
    return int.from_bytes(digest.digest(), "little") / 2**64
