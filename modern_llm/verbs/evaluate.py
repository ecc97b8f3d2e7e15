"""The verb `evaluate`: how well a policy prefers what people preferred."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.files import Settings


class EvaluateSettings(Settings):
    """Judge a checkpoint on preference pairs: accuracy, margins, calibration, by source."""

    model: str
    """Hub id, transformers folder or .pt file of the policy."""
    reference: str | None = None
    """The checkpoint that rewards compare it with; the bare likelihoods are judged without one."""
    data: str
    """Preference data: Hub id, file or folder."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the rewards; calibration and margins depend on it, accuracy does not."""
    by: str | None = None
    """Column whose values name groups to judge apart; the files of the data unless said."""
    split: str | None = None
    """Split of a Hub data set or folder."""
    template: str | None = None
    """As in the data section of dpo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and response together."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; half of max_length unless said."""
    max_examples: Annotated[int, Field(gt=0)] | None = None
    """Use only the first so many rows."""
    mixed_precision: Literal["no", "fp32", "bf16", "fp16"] = "no"
    """Dtype of the forward: no, bf16 or fp16."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row of broken structure does: error or skip."""


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """Judge the model, show the judgement unless `--json` asks for it alone."""
    from modern_llm.report.terminal import show_judgement
    from modern_llm.training.evaluate import evaluate_pairs

    data = PreferenceDatasetConfig(
        dataset_name=settings.data,
        split=settings.split,
        template=settings.template,
        max_examples=settings.max_examples,
        on_bad_row=settings.on_bad_row,
    )
    result = evaluate_pairs(
        settings.model,
        data,
        reference=settings.reference,
        beta=settings.beta,
        by=settings.by,
        tokenizer_name=settings.tokenizer_name,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        mixed_precision=settings.mixed_precision,
    )
    if not settings.json_output and os.environ.get("RANK", "0") == "0":
        show_judgement(result)
    return result
