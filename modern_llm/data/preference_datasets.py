"""Token tables of preference pairs for DPO, with the columns (prompt, chosen, rejected)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modern_llm.config.data import PreferenceDatasetConfig
from modern_llm.data.encode.chat_template import Tokenizer
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.table.build import Prepared, prepare

__all__ = ["PreferenceDatasetConfig", "build_preference_tables"]


def build_preference_tables(
    config: PreferenceDatasetConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    max_length: int = 512,
    max_prompt_length: int | None = None,
    check: Callable[[], None] | None = None,
) -> Prepared:
    """Return tables with the columns (prompt, chosen, rejected), built in `folder` or reused.

    Args:
        max_length: most tokens of prompt and one answer together.
        max_prompt_length: tokens of the prompt's end that are kept at least; by default half of
            `max_length`.
        check: called now and then; what it raises ends the build.

    Raises:
        UserError: the lengths leave no room for an answer, or the tokenizer lacks an end token.
        DataError: the data cannot be read, is broken or leaves nothing.
        StorageError: the folder cannot be written.
    """
    recipe = recipe_of(config, tokenizer, max_length, max_prompt_length)
    return prepare(config, tokenizer, folder, recipe, check)
