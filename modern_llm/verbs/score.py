"""The verb `score`: log-prob sums of both answers of every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.files import Settings


class ScoreSettings(Settings):
    """Write the log-prob sums of both answers of every pair, one JSON object a line."""

    model: str
    """Hub id, transformers folder or .pt file whose log-probs are asked for."""
    reference: str | None = None
    """A second model scored on the same pairs."""
    data: str
    """Preference data: Hub id, file or folder."""
    output: Path
    """The .jsonl file to write."""
    split: str | None = None
    """Split of a Hub data set."""
    template: str | None = None
    """As in the data section of dpo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and response together."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; half of max_length unless said."""
    mixed_precision: Literal["no", "fp32", "bf16", "fp16"] = "no"
    """Dtype of the forward: no, bf16 or fp16."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row of broken structure does: error or skip."""


def score(settings: ScoreSettings) -> dict[str, Any]:
    """Score the pairs; return how many, and the file."""
    from modern_llm.training.score import score_pairs

    data = PreferenceDatasetConfig(
        dataset_name=settings.data,
        split=settings.split,
        template=settings.template,
        on_bad_row=settings.on_bad_row,
    )
    return score_pairs(
        settings.model,
        data,
        settings.output,
        reference=settings.reference,
        tokenizer_name=settings.tokenizer_name,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        mixed_precision=settings.mixed_precision,
    )
