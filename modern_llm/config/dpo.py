"""`DPOConfig`: which preference loss, with what options, against which reference.

Its options are judged by the catalogue of losses: one that a loss does not take is refused here,
when
the section is built, and not ignored later.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from modern_llm.config.base import Fixed, Free, SameContent, section
from modern_llm.objectives.catalogue import LOSSES, check_options

# Options about the reference; those in the second row are about stored values.
REFERENCE = (
    "reference", "reference_checkpoint", "reference_digest", "reference_store",
    "keep_token_logprobs", "flush_every", "self_check_pairs",
)  # fmt: skip
NOT_LIVE = ("keep_token_logprobs", "flush_every", "self_check_pairs")
# The losses' own options; None means the default of the loss's row.
OPTIONS = ("discopop_tau", "simpo_gamma", "dpop_lambda")


@section
class DPOConfig:
    """The preference objective."""

    beta: Fixed[float] = 0.1
    """Strength of the pull to the reference (Rafailov et al., 2023); the weight of the odds term
    in orpo."""
    max_length: Fixed[Annotated[int, Field(ge=2)]] = 512
    """Tokens of prompt and response together."""
    label_smoothing: Fixed[float] = 0.0
    """Share of pairs assumed to be labelled the wrong way round. exo_pair needs a positive value:
    with it, 0 means its default of 0.001."""
    max_prompt_length: Fixed[Annotated[int, Field(ge=0)] | None] = None
    """Tokens of the prompt's end that are kept at least when both are too long; by default half of
    max_length."""
    loss_type: Fixed[str] = "sigmoid"
    """sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero, apo_down, discopop, sigmoid_norm, simpo, orpo or dpop."""
    group_by_prompt: Fixed[bool] = False
    """Put pairs with one prompt into one optimizer step, where prompt and equal answers are
    computed once. Another order of the data."""
    nll_coefficient: Fixed[float] = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to any loss."""
    discopop_tau: Fixed[float | None] = None
    """Temperature of discopop (default 0.05)."""
    simpo_gamma: Fixed[float | None] = None
    """Target reward margin of simpo (default 0.5)."""
    dpop_lambda: Fixed[float | None] = None
    """Weight of dpop's penalty (default 50)."""
    ld_alpha: Fixed[Annotated[float, Field(ge=0, lt=1)] | None] = None
    """Weight of the longer answer's tokens beyond the length of the shorter one (LD-DPO, Liu et al.
    2024); by default all tokens count fully."""
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
    """Also keep the log-prob of every token in the store; ld_alpha needs it and does so by
    itself."""
    flush_every: Free[Annotated[int, Field(gt=0)]] = 2048
    """Pairs between two shards of the reference pass: what a killed pass scores again at most."""
    self_check_pairs: Free[Annotated[int, Field(gt=0)] | None] = None
    """Pairs whose stored reference values are scored again before step 1 (default 16)."""

    @model_validator(mode="after")
    def _check(self) -> DPOConfig:
        problems = check_options(self.loss_type, self.loss_options, beta=self.beta)
        if self.ld_alpha is not None and self.loss_type in LOSSES:
            if LOSSES[self.loss_type].lengths:
                problems.append(
                    f"ld_alpha cannot be combined with loss_type={self.loss_type!r}, which divides "
                    "by the lengths itself: remove one"
                )
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            problems.append(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a response in "
                "max_length "
                f"{self.max_length}: lower it"
            )
        if self.loss_type in LOSSES:
            problems += self._reference_problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _reference_problems(self) -> list[str]:
        """Return reference options that have no effect or contradict each other."""
        row = LOSSES[self.loss_type]
        default = {f.name: f.default for f in dataclasses.fields(self) if f.name in REFERENCE}
        said = [name for name, value in default.items() if getattr(self, name) != value]
        if not row.reference:
            return [
                f"{name} has no effect with loss_type={self.loss_type!r}, which reads no "
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
    def per_token(self) -> bool:
        """Whether the reference's log-prob of every token is needed."""
        return self.keep_token_logprobs or self.ld_alpha is not None

    @property
    def loss_options(self) -> dict[str, float | None]:
        """The options as `preference_loss` takes them; None where the loss's default holds."""
        options: dict[str, float | None] = {name: getattr(self, name) for name in OPTIONS}
        options["nll_coefficient"] = self.nll_coefficient
        options["label_smoothing"] = self.label_smoothing or None
        return options

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads the reference's log-probs."""
        return LOSSES[self.loss_type].reference

    @property
    def looks_across_pairs(self) -> bool:
        """Whether the loss must see all pairs of an optimizer step at once."""
        return LOSSES[self.loss_type].across_pairs
