"""`DPOConfig`: which preference loss, with what options, against which reference.

Its options are judged by the catalogue of losses: one that a loss does not take is refused here,
when
the section is built, and not ignored later.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from modern_llm.config.base import section
from modern_llm.objectives.catalogue import LOSSES, check_options

# The losses' own options; None means the default of the loss's row.
OPTIONS = ("discopop_tau", "simpo_gamma", "dpop_lambda")


@section
class DPOConfig:
    """The preference objective."""

    beta: float = 0.1
    """Strength of the pull to the reference (Rafailov et al., 2023); the weight of the odds term
    in orpo."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens of prompt and response together."""
    label_smoothing: float = 0.0
    """Share of pairs assumed to be labelled the wrong way round. With exo_pair, which cannot do
    with 0,
    0 means its default of 0.001."""
    max_prompt_length: Annotated[int, Field(ge=0)] | None = None
    """Tokens of the prompt's end that are kept at least when both are too long; half of max_length
    unless said."""
    loss_type: str = "sigmoid"
    """sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero,
    apo_down, discopop, sigmoid_norm, simpo, orpo or dpop."""
    nll_coefficient: float = 0.0
    """Weight of the chosen answer's mean negative log-likelihood, added to any loss."""
    discopop_tau: float | None = None
    """Temperature of discopop (0.05 unless said)."""
    simpo_gamma: float | None = None
    """Target reward margin of simpo (0.5 unless said)."""
    dpop_lambda: float | None = None
    """Weight of dpop's penalty (50 unless said)."""
    reference: Literal["cache"] = "cache"
    """cache: score with the SFT checkpoint what the store lacks, then train without it."""
    self_check_pairs: Annotated[int, Field(gt=0)] | None = None
    """Pairs whose stored reference values are scored again by the policy before step 1; 16 unless
    said."""

    @model_validator(mode="after")
    def _check(self) -> DPOConfig:
        problems = check_options(self.loss_type, self.loss_options, beta=self.beta)
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            problems.append(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a response in "
                "max_length "
                f"{self.max_length}: lower it"
            )
        known = self.loss_type in LOSSES
        if known and self.self_check_pairs is not None and not LOSSES[self.loss_type].reference:
            problems.append(
                f"self_check_pairs has no effect with loss_type={self.loss_type!r}, which reads no "
                "reference: remove it"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

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
