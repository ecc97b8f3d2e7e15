"""The token ids that would be trained on, as JSON lines: `inspect --tokens OUT.jsonl`.

One object for each kept training row: `origin`, the ids of each column as `<column>_ids` and,
for a column of which not every id is a target, a mask of 0 and 1 as `<column>_targets`; `weight`
and `margin` of pairs that have them. The rows come from the same code as training's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from modern_llm.config.errors import StorageError, UserError
from modern_llm.data.encode.pipeline import Recipe, RowPacker
from modern_llm.data.encode.tokenizer import Ids
from modern_llm.data.read.labelled import LABEL
from modern_llm.data.table.gaps import none, trained_of
from modern_llm.data.table.token_table import STARTS
from modern_llm.storage.fault_points import around

Sink = Callable[[Sequence[Ids], str, Mapping[str, float] | None], None]


@contextmanager
def token_lines(path: Path, recipe: Recipe) -> Iterator[Sink]:
    """Give a function that writes one row; the file appears at `path` when the block succeeds.

    Raises:
        UserError: the folder of `path` does not exist, or `path` is a folder.
        StorageError: the file cannot be written.
    """
    if not path.parent.is_dir() or path.is_dir():
        found = "is a folder" if path.is_dir() else f"{path.parent} is no folder"
        raise UserError(f"tokens {path}: {found}; name a file in a folder that exists")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with around("tokens.make"), temporary.open("w", encoding="utf-8") as out:
            writer = _Writer(out, recipe.columns)
            length = recipe.row_length
            yield writer.add if length is None else RowPacker(writer, length).add
        with around("tokens.replace"):
            temporary.replace(path)
    except OSError as error:
        raise StorageError(f"tokens {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


class _Writer:
    def __init__(self, out: TextIO, columns: Sequence[str]):
        self._out, self._columns = out, columns

    def add(
        self, cells: Sequence[Ids], origin: str, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Write one row."""
        values = dict(zip(self._columns, cells, strict=True))
        starts, gaps_at = values.pop(STARTS, None), getattr(cells, "gaps", ())
        entry: dict[str, Any] = {"origin": origin}
        for at, (name, ids) in enumerate(values.items()):
            if at > 2 and not len(ids):
                continue  # rankings are padded
            entry[f"{name}_ids"] = ids.tolist()
            # The first token of a text has nothing before it that predicts it.
            first = starts if starts is not None else [0]
            alone = starts is not None or ("prompt" in values and not len(values["prompt"]))
            gaps = gaps_at[self._columns.index(name)] if gaps_at else none()
            if name != "prompt" and (alone or len(gaps)):
                mask = trained_of(gaps, len(ids)).astype(int).tolist()
                for place in first if alone else ():
                    mask[int(place)] = 0
                entry[f"{name}_targets"] = mask
        entry |= numbers or {}
        if LABEL in entry:  # as it is read
            entry[LABEL] = entry[LABEL] == 1
        with around("tokens.write"):
            self._out.write(json.dumps(entry) + "\n")
