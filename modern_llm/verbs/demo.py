"""The verb `demo`: all three stages on a generated corpus."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from modern_llm.verbs.settings import Settings


class DemoSettings(Settings):
    """Pretrain, fine-tune and align a small model on generated questions, in a few minutes on a
    CPU."""

    example: ClassVar[str] = "modern-llm demo --output_dir experiments/demo"

    output_dir: Path = Path("experiments/demo")
    """Where data, models and the table go; a finished demo there is repeated."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the corpus, the weights and the order."""


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo; return its table."""
    from modern_llm.demo.run import run_demo

    return run_demo(settings.output_dir, seed=settings.seed)
