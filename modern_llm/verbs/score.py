"""The verb `score`: log-prob sums of both answers of every pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from modern_llm.config.errors import ConfigError
from modern_llm.verbs.pairs import PairsSettings


class ScoreSettings(PairsSettings):
    """Write the log-prob sums of both answers of every pair, one JSON object a line."""

    example: ClassVar[str] = (
        "modern-llm score --model runs/dpo/last --data pairs.jsonl --output scores.jsonl"
    )

    output: Path
    """The .jsonl file to write."""
    force: bool = False
    """Overwrite the file that --output names."""


def score(settings: ScoreSettings) -> dict[str, Any]:
    """Score the pairs; return how many, and the file."""
    if settings.output.exists() and not settings.force:
        raise ConfigError([f"output {settings.output}: exists; name another, or add --force"])
    from modern_llm.evaluation.score import score_pairs

    return score_pairs(settings.model, settings.section(), settings.output, **settings.options())
