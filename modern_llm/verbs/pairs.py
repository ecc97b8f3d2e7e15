"""What `score` and `evaluate` have in common: pairs that are scored under one model or two."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.verbs.settings import Settings, build_section


class PairsSettings(Settings):
    """Which pairs, and how they are scored."""

    model: str
    """Hub id, transformers folder, .pt file or a run's checkpoint (RUN/last, RUN/best)."""
    reference: str | None = None
    """A second model scored on the same pairs; rewards compare the first with it."""
    data: str
    """Preference data: Hub id, file or folder."""
    split: str | None = None
    """Split of a Hub data set or folder."""
    columns: dict[str, str] | None = None
    """As in the data section of dpo: prompt=question,chosen=best,rejected=worst."""
    targets: Literal["last", "all"] | None = None
    """As in the data section: turns of the assistant that are trained on."""
    template: str | None = None
    """As in the data section of dpo."""
    tokenizer_name: str | None = None
    """Hub id or folder of the tokenizer; comes before the model's own."""
    plugins: list[str] = Field(default_factory=list)
    """Modules to import first, on every process; they register formats of your own."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and response together."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least; by default half of max_length."""
    max_examples: Annotated[int, Field(gt=0)] | None = None
    """Use only the first so many rows."""
    mixed_precision: Literal["no", "fp32", "bf16", "fp16"] = "no"
    """Dtype of the forward: no, bf16 or fp16."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row of broken structure does: error or skip."""
    hang_timeout: Annotated[float, Field(gt=0)] | None = 600.0
    """Seconds without progress after which a process that others wait for counts as hung, as
    train.hang_timeout; one process alone is only warned. null watches nothing."""

    sequence_parallel: Annotated[int, Field(gt=0)] = 1
    """Processes that share every row, as train.sequence_parallel."""

    def section(self) -> PreferenceDatasetConfig:
        """Return what is read."""
        return build_section(
            PreferenceDatasetConfig,
            dataset_name=self.data,
            split=self.split,
            columns=self.columns,
            template=self.template,
            targets=self.targets or "last",
            max_examples=self.max_examples,
            on_bad_row=self.on_bad_row,
        )

    def options(self) -> dict[str, Any]:
        """Return the arguments of `training.score.scored_pairs`."""
        return {
            "reference": self.reference,
            "tokenizer_name": self.tokenizer_name,
            "max_length": self.max_length,
            "max_prompt_length": self.max_prompt_length,
            "mixed_precision": self.mixed_precision,
            "hang_timeout": self.hang_timeout,
            "sequence_parallel": self.sequence_parallel,
        }
