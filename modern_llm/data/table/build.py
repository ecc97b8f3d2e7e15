"""Token tables of a data section: read, check, tokenise, hold out and write, or reuse.

One pass in batches, so that memory does not grow with the data. A folder that already holds the
tables of the same bytes, tokenizer and settings is reused. A failed build leaves nothing on disk.
On a machine with several processes the caller lets one of them build first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from numpy.typing import NDArray

from modern_llm.config.data import LENGTH, RANDOM, DatasetConfig
from modern_llm.config.errors import DataError, StorageError
from modern_llm.data.encode.chat_template import Tokenizer
from modern_llm.data.encode.kinds import format_name, kind_of
from modern_llm.data.encode.pipeline import Recipe, RowPacker, recipe_of, trains_on_all
from modern_llm.data.encode.tokenizer import Ids, tokenizer_identity
from modern_llm.data.read.formats import Record
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import ContentFault, Document, Dropped, RowFault, TokenIds
from modern_llm.data.read.sources import Source
from modern_llm.data.table.counts import DataReport, Drops, dropped_rows
from modern_llm.data.table.iterate import (
    FELL_BACK,
    RecordReader,
    WeightedSource,
    evaluation_source,
    in_batches,
    read_items,
    share_of,
    training_sources,
)
from modern_llm.data.table.token_table import TokenTable, TokenTableWriter
from modern_llm.storage.atomic import new_folder
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.untrusted import parse_json

__all__ = ["FELL_BACK", "Prepared", "holds_ids", "prepare_tables", "sample_texts"]

VERSION = 4


@dataclass(frozen=True)
class Prepared:
    """The tables of a section.

    `evaluation` is None where the section names no evaluation data; `evaluation_report` is there
    where that comes from a source of its own. `parts` has one report a training source, `report`
    their sum.
    """

    train: TokenTable
    evaluation: TokenTable | None
    report: DataReport
    evaluation_report: DataReport | None = None
    parts: tuple[DataReport, ...] = ()
    history: tuple[tuple[int, int], ...] | None = None
    """(epoch, rows) from which there were so many, where a run has gone on with appended rows."""
    order: str = RANDOM
    """Order of the training rows, as `data.order` names it."""

    def order_keys(self) -> NDArray[Any] | None:
        """Return the numbers (rows,) that the training rows are sorted by, None for `random`.

        Raises:
            DataError: no row has the column.
        """
        if self.order == RANDOM:
            return None
        if self.order == LENGTH:
            return self.train.sizes
        keys = self.train.values(self.order)
        if keys is None:
            raise DataError(
                f"{self.report.source}: data.order {self.order!r}: no row has that column of "
                "numbers; name one that has, or use random or length"
            )
        return keys

    def lines(self) -> list[str]:
        """Return a report to print: every source, and the sum of several."""
        reports = [*self.parts, self.report] if len(self.parts) > 1 else [self.report]
        return [line for report in reports for line in report.lines()]


def prepare_tables(
    config: DatasetConfig,
    tokenizer: Tokenizer | None,
    folder: Path,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    check: Callable[[], None] | None = None,
) -> Prepared:
    """Return the tables of a section from `folder`, building them there unless they are up to date.

    Their columns are those of the section's `DataKind`.

    Args:
        tokenizer: None where every row holds token ids.
        max_length: most tokens of a prompt with one response, or the length of the rows that
            documents are cut into; by default the section's, else its kind's. The caller must keep
            it within the model's positions.
        max_prompt_length: tokens of the prompt's end that are kept at least; by default the
            section's, else half of `max_length`.
        check: called after every batch of rows; what it raises ends the build and leaves nothing.

    Raises:
        UserError: the lengths leave no room, or the tokenizer lacks an end token.
        DataError: a source cannot be read, is broken, or leaves nothing to train or evaluate on.
        StorageError: the folder cannot be written.
    """
    length = max_length or getattr(config, "max_length", None) or kind_of(config).default_length
    if max_prompt_length is None:
        max_prompt_length = getattr(config, "max_prompt_length", None)
    recipe = recipe_of(config, tokenizer, length, max_prompt_length)
    parts, evaluation = training_sources(config), evaluation_source(config)
    key = _key(config, tokenizer, recipe, parts, evaluation)
    order = getattr(config, "order", RANDOM)
    if (found := _reuse(folder, key)) is not None:
        return replace(found, order=order)
    with new_folder(folder) as new:
        with dropped_rows(new) as out:
            reports = _Build(config, recipe, new, out, check).tables(parts, "train")
            other = None
            if evaluation is not None:
                whole = replace(config, eval_fraction=None)
                build = _Build(whole, recipe, new, out, check)
                (other,) = build.tables([WeightedSource(evaluation)], "evaluation")
        summary = {
            "key": key,
            "reports": [report.as_dict() for report in reports],
            "evaluation_report": other and other.as_dict(),
        }
        with around("prepared.write"):
            (new / "prepared.json").write_text(json.dumps(summary), encoding="utf-8")
    found = _reuse(folder, key)
    if found is None:
        raise StorageError(
            f"{folder}: another process keeps writing other data here: give each its own"
        )
    return replace(found, order=order)


def evaluation_table(
    config: DatasetConfig, recipe: Recipe, folder: Path, check: Callable[[], None] | None
) -> DataReport:
    """Write the table `evaluation` of a section's evaluation data into `folder`, beside a stream
    that it is trained on."""
    source = evaluation_source(config)
    assert source is not None
    with new_folder(folder) as new:
        with dropped_rows(new) as out:
            build = _Build(replace(config, eval_fraction=None), recipe, new, out, check)
            (report,) = build.tables([WeightedSource(source)], "evaluation")
    return report


def sample_texts(config: DatasetConfig, count: int = 64) -> list[str]:
    """Return the texts of the first `count` rows of each source that are good, to compare
    tokenizers on."""
    texts: list[str] = []
    for part in training_sources(config):
        for record in _first_records(part, config, count):
            texts += _texts(record)
    return texts


def holds_ids(config: DatasetConfig) -> bool:
    """Whether the first good row of every source holds token ids: they need no tokenizer."""
    other = evaluation_source(config)
    sources = [*training_sources(config), *([WeightedSource(other)] if other else [])]
    first = [next(_first_records(part, config, 64), None) for part in sources]
    return all(isinstance(getattr(record, "prompt", None), TokenIds) for record in first)


def _first_records(part: WeightedSource, config: DatasetConfig, count: int) -> Iterator[Record]:
    """Yield the good ones of the first `count` rows of a source."""
    name = part.format or format_name(config)
    record_of = RecordReader(kind_of(config).formats(config), name, whole=trains_on_all(config))
    for row in islice(part.source, count):
        with suppress(RowFault, ContentFault):
            if isinstance(row, Row):
                yield record_of(row)


def _texts(record: Any) -> list[str]:
    if isinstance(record, Document):
        return [record.text]
    prompt = record.prompt
    if isinstance(prompt, TokenIds):
        return []
    turns = [prompt] if isinstance(prompt, str) else [*prompt]
    for response in record.responses:
        turns += response if isinstance(response, list) else [response]
    texts = (turn if isinstance(turn, str) else turn.get("content") for turn in turns)
    return [text for text in texts if isinstance(text, str)]


def _key(
    config: DatasetConfig,
    tokenizer: Tokenizer | None,
    recipe: Recipe,
    parts: Sequence[WeightedSource],
    evaluation: Source | None,
) -> str:
    """Digest of everything that the tables depend on."""
    facts = {
        "version": VERSION,
        "section": [type(config).__name__, _section(config)],
        "settings": recipe.settings,
        "tokenizer": tokenizer_identity(tokenizer),
        "sources": [
            *(part.source.identity for part in parts),
            evaluation and evaluation.identity,
        ],
    }
    if own := [[entry.name, entry.version] for entry in recipe.formats if entry.version]:
        facts["own_formats"] = own
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _section(config: DatasetConfig) -> dict[str, Any]:
    """Return the options of a section; those that tables of before lack only where they are set."""
    options = asdict(config)
    if options.get("rankings") == "best_worst":
        del options["rankings"]
    for values in (options, *(options["sources"] or ())):
        if values["columns"] is None:
            del values["columns"]
    if "streaming_window" in options:  # the tables of a stream are not these
        del options["streaming"], options["streaming_window"]
    if options.get("targets") == "last":  # likewise
        del options["targets"]
    return options


def _reuse(folder: Path, key: str) -> Prepared | None:
    """Return the tables in `folder` if they are complete and have this key."""
    try:
        summary = parse_json(read_text(folder / "prepared.json", 100_000_000, follow=False))
        if summary["key"] != key:
            return None
        parts = [DataReport.from_dict(values) for values in summary["reports"]]
        report = DataReport.merged(parts)
        other = summary["evaluation_report"]
        held_out = other is not None or report.evaluation_examples
        return Prepared(
            train=TokenTable.open(folder / "train"),
            evaluation=TokenTable.open(folder / "evaluation") if held_out else None,
            report=report,
            evaluation_report=other and DataReport.from_dict(other),
            parts=tuple(parts),
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StorageError):
        return None


class _Build:
    """One pass over each source of a section."""

    def __init__(
        self,
        config: DatasetConfig,
        recipe: Recipe,
        folder: Path,
        out: TextIO,
        check: Callable[[], None] | None,
    ):
        self._config, self._recipe, self._folder, self._out = config, recipe, folder, out
        self._check = check

    def tables(self, parts: Sequence[WeightedSource], name: str) -> list[DataReport]:
        """Write the table `name` (and `evaluation`, if a fraction is held out) from all sources.

        Returns:
            One report a source; documents run on from one source into the next, so that what does
            not fill a row is counted with the last.
        """
        recipe, fraction = self._recipe, self._config.eval_fraction
        with ExitStack() as stack:
            sinks = {
                table: _Sink(
                    stack.enter_context(
                        TokenTableWriter(self._folder / table, recipe.columns, recipe.stored)
                    ),
                    recipe.row_length,
                )
                for table in ([name] if fraction is None else [name, "evaluation"])
            }
            reports = [self._source(part, sinks, name) for part in parts]
            reports[-1].tokens_cut += sum(sink.leftover for sink in sinks.values())
            whole = DataReport.merged(reports)
            for table, sink in sinks.items():
                if sink.rows == 0:
                    raise DataError(f"{whole.source}: {self._nothing_in(table, sink, whole)}")
        return reports

    def _source(self, part: WeightedSource, sinks: dict[str, _Sink], name: str) -> DataReport:
        config, report = self._config, DataReport(part.source.name)
        drops = Drops(self._out, report)
        before = {table: (sink.rows, sink.tokens) for table, sink in sinks.items()}
        self._recipe.cuts.clear()
        held = self._recipe.held_out_by
        for cells, origin, numbers in self._rows(part, drops):
            report.count(numbers)
            fraction = config.eval_fraction
            if fraction is not None and share_of(cells[:held]) < fraction:
                sinks["evaluation"].add(cells, origin, numbers)
                continue
            for _ in range(part.times(cells)):
                sinks[name].add(cells, origin, numbers)
        drops.settle(config.max_dropped)
        differing = report.drops.get("transcripts differ before the last turn", 0)
        if differing and {"messages", "sharegpt"} & set(report.formats):
            report.notes.append(
                f"{part.source.name}: {differing:,} pairs differ before the last turn: "
                "data.targets: all trains on whole conversations"
            )
        cuts = self._recipe.cuts
        report.prompts_cut, report.responses_cut = cuts.prompts, cuts.responses
        report.tokens_cut = cuts.tokens
        gained = {
            table: (sink.rows - before[table][0], sink.tokens - before[table][1])
            for table, sink in sinks.items()
        }
        report.tokens = sum(tokens for _, tokens in gained.values())
        report.examples = gained[name][0]
        if len(sinks) > 1:
            report.evaluation_examples = gained["evaluation"][0]
        report.notes += getattr(part.source, "notes", ())
        report.note_values()
        if part.weight != 1:
            report.notes.append(f"{part.source.name}: weight {part.weight:g}")
        return report

    def _rows(
        self, part: WeightedSource, drops: Drops
    ) -> Iterator[tuple[list[Ids], str, Mapping[str, float] | None]]:
        """Cells, origin and numbers of every row that is kept, tokenised in batches."""
        recipe = self._recipe
        if part.format is not None:
            recipe = replace(recipe, name=part.format)
        for batch in in_batches(read_items(part.source, self._config, recipe, drops)):
            if self._check is not None:
                self._check()
            ids = iter(recipe.encoder([text for item in batch for text in item.texts]))
            for item in batch:
                mine = [next(ids) for _ in item.texts]
                try:
                    yield recipe.cells(recipe.split(item, mine)), item.origin, item.numbers
                except ContentFault as fault:
                    drops.add(Dropped(item.origin, str(fault), str(fault)))

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
