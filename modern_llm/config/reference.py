"""What stages with a frozen reference have in common: lengths, and the source of its log-probs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from modern_llm.config.base import Fixed, Free, SameContent, section

# Options about the reference; some are of one stage alone, the last row is about stored values.
REFERENCE = (
    "reference", "reference_checkpoint", "reference_digest", "reference_store",
    "reference_sync_every", "reference_mixup",
    "keep_token_logprobs", "flush_every", "self_check_pairs",
)  # fmt: skip
NOT_LIVE = ("keep_token_logprobs", "flush_every", "self_check_pairs")


@section
class ReferenceConfig:
    """Lengths of the examples, and the reference that the policy is compared with."""

    section_name: ClassVar[str]
    """Name of the section in a configuration, for messages."""

    max_length: Fixed[Annotated[int, Field(ge=2)]] = 512
    """Tokens of prompt and response together."""
    max_prompt_length: Fixed[Annotated[int, Field(ge=0)] | None] = None
    """Tokens of the prompt's end that are kept at least when both are too long; by default half of
    max_length."""
    reference: Free[Literal["cache", "store", "model"]] = "cache"
    """cache: score with the reference what the store lacks, then train without it. store: never
    score; the values must be there, the reference's weights need not. model: no store, a frozen
    model beside the policy."""
    reference_checkpoint: SameContent[str | None] = None
    """Hub id, transformers folder, .pt file or run checkpoint of the reference; by default the
    policy's start."""
    reference_digest: Free[Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")] | None] = None
    """With reference: store, the digest that the reference's weights should have (hex, at least
    the first 16 digits), where the weights themselves are not available."""
    reference_store: Free[Path | None] = None
    """With reference: store, the folder of the store; by default one under MODERN_LLM_CACHE."""
    keep_token_logprobs: Free[bool] = False
    """Also keep the log-prob of every token in the store; dpo.ld_alpha needs it and does so by
    itself."""
    flush_every: Free[Annotated[int, Field(gt=0)]] = 2048
    """Pairs (KTO: responses) between two shards of the reference pass: what a killed pass scores
    again at most."""
    self_check_pairs: Free[Annotated[int, Field(gt=0)] | None] = None
    """Pairs (KTO: responses) whose stored values are scored again before step 1 (default 16)."""

    def length_problems(self) -> list[str]:
        """Return what is wrong with the two lengths together."""
        if self.max_prompt_length is None or self.max_prompt_length < self.max_length:
            return []
        return [
            f"max_prompt_length {self.max_prompt_length} leaves no room for a response in "
            f"max_length {self.max_length}: lower it"
        ]

    def reference_problems(self) -> list[str]:
        """Return reference options that have no effect or contradict each other."""
        default = {f.name: f.default for f in dataclasses.fields(self) if f.name in REFERENCE}
        said = [name for name, value in default.items() if getattr(self, name) != value]
        if not self.needs_reference:
            return [
                f"{name} has no effect with loss_type={self.loss_name!r}, which reads no "
                "reference: remove it"
                for name in said
            ]
        problems = []
        for name in said:
            if name in ("reference_digest", "reference_store") and self.reference != "store":
                problems.append(f"{name} has an effect with reference: store alone: remove it")
            if name in NOT_LIVE and self.reference == "model":
                problems.append(f"{name} has no effect with reference: model: remove it")
            if name == "flush_every" and self.reference == "store":
                problems.append("flush_every has no effect with reference: store: remove it")
        if self.reference_digest and self.reference_checkpoint:
            problems.append(
                "reference_digest and reference_checkpoint both name the reference: keep one"
            )
        return problems

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probs."""
        return True

    @property
    def per_token(self) -> bool:
        """Whether the reference's log-prob of every token is needed."""
        return self.keep_token_logprobs or self.tail_weight is not None

    @property
    def tail_weight(self) -> float | None:
        """Weight of the tokens beyond the pair's shorter response, None where all count fully."""
        return None

    @property
    def loss_name(self) -> str:
        """The losses as one text."""
        raise NotImplementedError
