"""Token tables of instructions for SFT, with the columns (prompt, response)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modern_llm.config.data import InstructionDatasetConfig
from modern_llm.data.encode.chat_template import Tokenizer
from modern_llm.data.encode.kinds import kind_of
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.table.build import Prepared, prepare

__all__ = ["InstructionDatasetConfig", "build_instruction_tables"]


def build_instruction_tables(
    config: InstructionDatasetConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    check: Callable[[], None] | None = None,
) -> Prepared:
    """Return tables with the columns (prompt, response), built in `folder` or reused from it.

    Args:
        max_length: most tokens of prompt and answer together; by default the section's, else
            1,024. The caller must keep it within the model's positions.
        max_prompt_length: tokens of the prompt's end that are kept at least; by default the
            section's, else half of `max_length`.
        check: called now and then; what it raises ends the build.

    Raises:
        UserError: the lengths leave no room for an answer, or the tokenizer lacks an end token.
        DataError: the data cannot be read, is broken or leaves nothing.
        StorageError: the folder cannot be written.
    """
    if max_prompt_length is None:
        max_prompt_length = config.max_prompt_length
    length = max_length or config.max_length or kind_of(config).default_length
    recipe = recipe_of(config, tokenizer, length, max_prompt_length)
    return prepare(config, tokenizer, folder, recipe, check)
