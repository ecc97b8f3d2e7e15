"""Recipes from rows to token ids: columns, texts and cells.

A `Recipe` holds the formats, the texts of a record to tokenise, and how their ids become the cells
of one row of a table. `answers_recipe` serves preferences and instructions, `documents_recipe`
pretraining; `RowPacker` cuts documents into rows of one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modern_llm.config.data import (
    LENGTH,
    RANDOM,
    ConversationDatasetConfig,
    DatasetConfig,
    DocumentDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.config.errors import UserError
from modern_llm.data.encode.boundary import Boundary, Parts
from modern_llm.data.encode.chat_template import Template, Tokenizer, end_tokens
from modern_llm.data.encode.conversations import WholeConversations
from modern_llm.data.encode.kinds import format_name, kind_of
from modern_llm.data.encode.tokenizer import (
    Encoder,
    Ids,
    Limits,
    Truncation,
    TruncationCounts,
    default_limits,
)
from modern_llm.data.read.formats import Format, Mode, Record
from modern_llm.data.read.records import RowFault, TokenIds, Turns
from modern_llm.data.table.gaps import Cells, none
from modern_llm.data.table.token_table import TokenTableWriter


@dataclass(frozen=True, slots=True)
class Item:
    """The texts of one record, one a column; `chat` if a chat template wrote the first."""

    texts: tuple[str, ...]
    origin: str
    chat: bool = False
    numbers: Mapping[str, float] | None = None
    """Numbers of the row beside its texts."""
    parts: Parts | None = None
    """The ids, where the row holds them in place of texts."""


@dataclass
class Recipe:
    """Recipe that turns the records of one kind into rows of a table.

    Attributes:
        formats, name: the table of formats, and the one that the user named or `auto`.
        mode: which function of a format reads a row: `framed` without a template, `talk` where
            strings become turns, else `convert`.
        columns: columns of the token table.
        item: record -> its texts.
        split: item and the ids of its texts -> prompt and answers, or a document, untruncated.
        cells: these -> the ids of one row, or of one document.
        settings: what the result depends on besides the data, the tokenizer and the section.
        row_length: length of the rows that documents are cut into, else None.
        cuts: counts what `cells` takes away.
        fell_back: whether messages are written by the fallback template.
        remarks: returns what a user should know of the rows since its last call.
        ends: ids that close an answer.
        whole: whether every turn of the assistant is trained on, not the last one alone.
        numbers: numbers that rows may have, with that of a source without them.
        values: numbers that every row has from its format.
        records: record of a row -> the records that become examples.
        held_out_by: first cells whose content decides which examples are held out; None for all.
    """

    formats: Sequence[Format]
    name: str
    mode: Mode
    columns: tuple[str, ...]
    encoder: Callable[[Sequence[str]], list[Ids]]
    item: Callable[[Record], Item]
    split: Callable[[Item, Sequence[Ids]], Parts]
    cells: Callable[[Parts], list[Ids]]
    settings: dict[str, Any]
    row_length: int | None = None
    cuts: TruncationCounts = field(default_factory=TruncationCounts)
    fell_back: bool = False
    remarks: Callable[[], list[str]] = list
    ends: frozenset[int] = frozenset()
    numbers: Mapping[str, float] = field(default_factory=dict)
    whole: bool = False
    values: tuple[str, ...] = ()
    records: Callable[[Record], Sequence[Record]] = lambda record: (record,)
    held_out_by: int | None = None

    @property
    def stored(self) -> dict[str, float]:
        """Numbers of a row of the table, with that of a row without them."""
        return dict.fromkeys(self.values, math.nan) | dict(self.numbers)


def recipe_of(
    section: DatasetConfig,
    tokenizer: Tokenizer | None,
    length: int,
    max_prompt_length: int | None = None,
) -> Recipe:
    """Return the recipe of any kind of section.

    Args:
        tokenizer: None where every row holds token ids.
        length: most tokens of a prompt with one response, or the length of a row of documents.
        max_prompt_length: tokens of the prompt's end that are kept at least; by default half of
            `length`.

    Raises:
        UserError: `max_prompt_length` beside documents, and what the recipes below raise.
    """
    if isinstance(section, ConversationDatasetConfig) and tokenizer is None:
        return ids_recipe(section, max_length=length, max_prompt_length=max_prompt_length)
    if isinstance(section, ConversationDatasetConfig):
        return answers_recipe(
            section, tokenizer, max_length=length, max_prompt_length=max_prompt_length
        )
    assert isinstance(section, DocumentDatasetConfig) and tokenizer is not None, type(section)
    if max_prompt_length is not None:
        raise UserError("max_prompt_length has no effect on documents: leave it out")
    return documents_recipe(section, tokenizer, length)


def answers_recipe(
    config: ConversationDatasetConfig,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None,
) -> Recipe:
    """Return the recipe for a prompt with one or more answers.

    Raises:
        UserError: the lengths leave no room, or an end token is wanted and there is none.
    """
    encoder = Encoder(tokenizer)
    template = Template(tokenizer, config.template, config.template_date)
    limits = default_limits(max_length, max_prompt_length, len(encoder.lead))
    plain_end, *_ = ends = end_tokens(tokenizer, template)
    if config.append_end_token and plain_end is None:
        raise UserError(
            "the tokenizer has no end token (eos_token) to close answers with: "
            "give one that has, or set append_end_token: false"
        )
    cuts = TruncationCounts()
    plain = Truncation(limits, plain_end, config.append_end_token, cuts)
    boundary = Boundary(encoder, tokenizer, ends, config.append_end_token)
    whole = WholeConversations(tokenizer, template, boundary, config)

    def item(record: Record) -> Item:
        if isinstance(record.prompt, TokenIds):
            return _item_of_ids(record, config)
        numbers = getattr(record, "numbers", None)
        if any(isinstance(response, Turns) for response in record.responses):
            return Item((), record.origin, True, numbers, whole(record))
        written = template.compose(record)
        return Item(boundary.texts(written), record.origin, written.chat, numbers)

    def split(item: Item, ids: Sequence[Ids]) -> Parts:
        return item.parts or boundary.split(item.texts, ids, chat=item.chat)

    def cells(parts: Parts) -> list[Ids]:
        prompt, *answers = parts.columns
        lead = encoder.has_lead(prompt)
        return plain(prompt, answers, has_lead=lead, ends=parts.ends, trained=parts.trained)

    return Recipe(
        **_of_kind(config, limits),
        mode="framed" if config.template is None else "talk" if template.wraps else "convert",
        encoder=encoder,
        item=item,
        split=split,
        cells=_padded(cells, config),
        cuts=cuts,
        fell_back=template.fell_back,
        remarks=template.take_remarks,
        ends=frozenset(ends) - {None},  # type: ignore[arg-type]
    )


def trains_on_all(config: DatasetConfig) -> bool:
    """Whether a section asks for every turn of the assistant."""
    return getattr(config, "targets", "last") == "all"


def _of_kind(config: ConversationDatasetConfig, limits: Limits) -> dict[str, Any]:
    """Return the attributes of a recipe that the section and its kind decide."""
    kind = kind_of(config)
    return {
        "formats": kind.formats(config),
        "name": format_name(config),
        "columns": kind.columns,
        "settings": {"max_length": limits.total, "max_prompt_length": limits.prompt},
        "numbers": _numbers(config),
        "whole": trains_on_all(config),
        "values": kind.values,
        "records": kind.records,
        "held_out_by": kind.held_out_by,
    }


def ids_recipe(
    config: ConversationDatasetConfig, *, max_length: int, max_prompt_length: int | None
) -> Recipe:
    """Return the recipe of rows that all hold token ids, without a tokenizer."""
    limits = default_limits(max_length, max_prompt_length, 0)
    cuts = TruncationCounts()
    plain = Truncation(limits, None, False, cuts)

    def item(record: Record) -> Item:
        if not isinstance(record.prompt, TokenIds):
            raise RowFault(
                "the row holds text, and there is no tokenizer: name one (tokenizer_name)"
            )
        return _item_of_ids(record, config)

    def cells(parts: Parts) -> list[Ids]:
        prompt, *answers = parts.columns
        return plain(prompt, answers, has_lead=True, trained=parts.trained)

    return Recipe(
        **_of_kind(config, limits),
        mode="convert",
        encoder=lambda texts: [],
        item=item,
        split=lambda item, ids: item.parts,
        cells=_padded(cells, config),
        cuts=cuts,
    )


def _padded(
    cells: Callable[[Parts], Cells], config: ConversationDatasetConfig
) -> Callable[[Parts], Cells]:
    """Return `cells` with empty ones for the responses that a ranking lacks."""
    width = len(kind_of(config).columns)

    def padded(parts: Parts) -> Cells:
        found = cells(parts)
        missing = width - len(found)
        found.extend([np.zeros(0, np.int32)] * missing)
        if len(found.gaps):
            found.gaps = [*found.gaps, *[none()] * missing]
        return found

    return padded


def _item_of_ids(record: Record, config: ConversationDatasetConfig) -> Item:
    """Return the item of a row of ids: they are trained on as they are, without an end token."""
    if config.template is not None:
        raise RowFault("data.template has no effect on token ids: remove it")
    columns = [record.prompt.ids, *(response.ids for response in record.responses)]
    masks = tuple(response.trained for response in record.responses)
    parts = Parts(columns, (None,) * len(record.responses), masks)
    return Item((), record.origin, numbers=record.numbers, parts=parts)


def _numbers(config: ConversationDatasetConfig) -> dict[str, float]:
    """Return the columns of numbers to read; NaN marks one that every source must have."""
    found: dict[str, float] = {}
    if isinstance(config, PreferenceDatasetConfig):
        found = {n: default for n, default in config.values.items() if n in config.pair_values}
    if config.order not in (RANDOM, LENGTH):
        found.setdefault(config.order, math.nan)
    return found


def documents_recipe(
    config: DocumentDatasetConfig, tokenizer: Tokenizer, row_length: int
) -> Recipe:
    """Return the recipe for documents: leading special tokens, ids, end token.

    Raises:
        UserError: there is no end token, or rows would be too short to predict anything.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token (eos_token) to stand between documents: "
            "give one that has"
        )
    if row_length < 2:
        raise UserError(f"row_length {row_length} holds no token to predict: at least 2")
    encoder = Encoder(tokenizer)
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)

    def item(record: Record) -> Item:
        return Item((record.text,), record.origin)

    def split(_: Item, ids: Sequence[Ids]) -> Parts:
        return Parts(list(ids))

    def cells(parts: Parts) -> list[Ids]:
        return [np.concatenate([encoder.with_lead(parts.columns[0]), end])]

    kind = kind_of(config)
    return Recipe(
        formats=kind.formats(config),
        name=format_name(config),
        mode="convert",
        columns=kind.columns,
        encoder=encoder,
        item=item,
        split=split,
        cells=cells,
        settings={"row_length": row_length},
        row_length=row_length,
        ends=frozenset({tokenizer.eos_token_id}),
    )


class RowPacker:
    """Cuts a stream of documents into rows of exactly `row_length` ids, with where documents begin.

    `starts` of a row always begins with 0: its first token has nothing before it, whether or not
    its document began in the row before. The origin of a row is that of its first token's document.
    """

    def __init__(self, writer: TokenTableWriter, row_length: int):
        self._writer, self._length = writer, row_length
        self._parts: list[Ids] = []
        self._starts: list[int] = []
        self._origin = ""
        self._filled = 0

    @property
    def leftover(self) -> int:
        """Ids that do not fill a row yet."""
        return self._filled

    def add(
        self, cells: Sequence[Ids], origin: str, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Append one document, which has no numbers."""
        ids = cells[0]
        while len(ids):
            if not self._filled:
                self._origin = origin
            self._starts.append(self._filled)
            part, ids = np.split(ids, [self._length - self._filled])
            self._parts.append(part)
            self._filled += len(part)
            if self._filled == self._length:
                starts = np.array(self._starts, dtype=np.int32)
                self._writer.add([np.concatenate(self._parts), starts], self._origin)
                self._parts, self._starts, self._filled = [], [], 0
