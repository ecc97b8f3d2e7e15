"""Token tables of documents for pretraining: full rows with the columns (text, starts)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modern_llm.config.data import DocumentDatasetConfig
from modern_llm.data.encode.chat_template import Tokenizer
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.table.build import Prepared, prepare

__all__ = ["DocumentDatasetConfig", "build_document_tables"]


def build_document_tables(
    config: DocumentDatasetConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    row_length: int,
    check: Callable[[], None] | None = None,
) -> Prepared:
    """Return tables with the columns (text, starts), built in `folder` or reused from it.

    Documents follow one another, each with its end token, and are cut into rows of `row_length`
    ids; `starts` holds where in the row a document (or the rest of one) begins, 0 first. What does
    not fill a last row is left out and counted.

    Args:
        check: called now and then; what it raises ends the build.

    Raises:
        UserError: the tokenizer lacks an end token, or `row_length` is below 2.
        DataError: the data cannot be read, is broken or does not fill a row.
        StorageError: the folder cannot be written.
    """
    recipe = recipe_of(config, tokenizer, row_length)
    return prepare(config, tokenizer, folder, recipe, check)
