"""The verb `evaluate`: how well a policy prefers what people preferred."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar

from pydantic import Field

from modern_llm.verbs.pairs import PairsSettings


class EvaluateSettings(PairsSettings):
    """Judge a checkpoint on preference pairs: accuracy, margins, calibration, by source. Without a
    reference the bare likelihoods are judged."""

    example: ClassVar[str] = (
        "modern-llm evaluate --model runs/dpo/last --reference runs/sft/last --data pairs.jsonl"
    )

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the rewards; calibration and margins depend on it, accuracy does not."""
    by: str | None = None
    """Column whose values name groups to judge separately; by default the files of the data."""


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Judge the model, show the judgement unless `--json` asks for it alone."""
    from modern_llm.evaluation.pairs import evaluate_pairs
    from modern_llm.verbs.terminal import show_judgement

    result = evaluate_pairs(
        settings.model,
        settings.section(),
        beta=settings.beta,
        by=settings.by,
        **settings.options(),
    )
    if not settings.json_output and os.environ.get("RANK", "0") == "0":
        show_judgement(result)
    return result
