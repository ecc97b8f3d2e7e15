"""`register_format`: a format of a user, a function from a row to the columns of a known format."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

from modern_llm.config.data import (
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.data.read import formats, labelled
from modern_llm.data.read.conversations import is_whole
from modern_llm.data.read.formats import Format, Mode, Record, choose_format
from modern_llm.data.read.rankings import RANKED_PREFERENCES
from modern_llm.data.read.records import ContentFault, RowFault
from modern_llm.data.read.values import Columns

KINDS = {
    "preferences": (PreferenceDatasetConfig, RANKED_PREFERENCES, formats.OWN_PREFERENCES),
    "labelled": (
        LabelledDatasetConfig,
        (*labelled.LABELLED, *RANKED_PREFERENCES),
        labelled.OWN_LABELLED,
    ),
    "instructions": (InstructionDatasetConfig, formats.INSTRUCTIONS, formats.OWN_INSTRUCTIONS),
}
Convert = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


def register_format(
    name: str,
    function: Convert,
    *,
    columns: Sequence[str],
    kind: Literal["preferences", "labelled", "instructions"] = "preferences",
) -> None:
    """Add a format that `data.format` can name, in this process.

    Args:
        function: row -> the same as one of the formats of the package has it, such as
            `{"prompt": ..., "chosen": ..., "rejected": ...}`; None leaves the row out. What it
            raises is reported with file and line.
        columns: columns by which rows of the format are known; it is tried before the others.

    Raises:
        ValueError: the name is taken by a format of the package, or no column is named.
    """
    if kind not in KINDS:
        raise ValueError(f"register_format: kind {kind!r} is none of {', '.join(KINDS)}")
    section, known, own = KINDS[kind]
    if name in ("auto", *(entry.name for entry in known)):
        raise ValueError(f"register_format: {name!r} is a format of this package: choose another")
    if isinstance(columns, str) or not columns or not callable(function):
        raise ValueError(
            f"register_format: {name} needs a function, and columns=[...] that rows have"
        )
    read = {mode: partial(_read, name, function, known, mode) for mode in get_args(Mode)}
    own[:] = [entry for entry in own if entry.name != name]
    own.append(
        Format(
            name,
            ", ".join(columns),
            formats.has_columns(*columns),
            **read,
            version=_version(function),
        )
    )
    if name not in section.formats:
        section.formats.append(name)


def _read(
    name: str,
    function: Convert,
    known: Sequence[Format],
    mode: Mode,
    values: Mapping[str, Any],
    origin: str,
) -> Record:
    """Return the record of a row, by the format of the package that the function makes of it."""
    try:
        row = function(values)
    except Exception as error:  # a user's function may raise anything
        raise RowFault(f"format {name!r}: {type(error).__name__}: {error}") from error
    if row is None:
        raise ContentFault(f"left out by format {name}")
    if not isinstance(row, Mapping):
        raise RowFault(f"format {name!r} returned {type(row).__name__}, expected a dict or None")
    made = Columns(row, whole=is_whole(values))
    return choose_format(known, "auto", made).function(mode)(made, origin)


def _version(function: Convert) -> str:
    """Return a digest of a function and its module's text, so that tables of an earlier one are not
    reused; the same on every process."""
    parts = []
    try:
        parts.append(inspect.getsource(inspect.getmodule(function) or function))
    except (OSError, TypeError):  # typed into a notebook or made by `eval`
        pass
    if (code := getattr(function, "__code__", None)) is not None:
        # Constants that are code would be shown with their address.
        plain = [c for c in code.co_consts if isinstance(c, (int, float, str, bytes))]
        parts += [code.co_code.hex(), repr(code.co_names), repr(plain)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
