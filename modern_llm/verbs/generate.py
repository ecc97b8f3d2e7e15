"""The verb `generate`: answers to prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from modern_llm.config.files import Settings


class GenerateSettings(Settings):
    """Answer prompts with a model."""

    model: str
    """Hub id, transformers folder or .pt file."""
    prompt: str | None = None
    """One prompt; read from --prompts, or line by line from standard input, where it is not
    given."""
    prompts: Path | None = None
    """A file of prompts: one a line, or .jsonl objects with a field prompt."""
    template: str | None = None
    """chat wraps each prompt as a user turn; a text with {prompt} frames it; none uses it
    literally."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Most tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; above, tokens are drawn."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that make up this share; needs a temperature above 0."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of the draws, 0 unless said; needs a temperature above 0."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Prompts that are answered together."""


def generate(settings: GenerateSettings) -> dict[str, Any]:
    """Answer the prompts, print and return the answers."""
    from modern_llm.models.generate import read_prompts
    from modern_llm.training.answer import answer_prompts

    prompts = read_prompts(settings.prompt, settings.prompts)
    answers = answer_prompts(
        settings.model,
        prompts,
        template=settings.template,
        tokenizer_name=settings.tokenizer_name,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    if not settings.json_output:
        for answer in answers:
            print(answer)
    return {"answers": [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)]}
