"""`DPOConfig`: which preference loss, with what options, against which reference.

Its options are judged by the catalogue of losses: one that a loss does not take is refused here,
when
the section is built, and not ignored later.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from modern_llm.config.base import Fixed, Free, SameContent, section
from modern_llm.config.errors import ConfigError
from modern_llm.objectives.catalogue import (
    DIVERGENCES,
    LOSSES,
    LossRow,
    check_options,
    coefficients_of,
    names_of,
    rows_of,
)

# Options about the reference; those in the second row are about stored values.
REFERENCE = (
    "reference", "reference_checkpoint", "reference_digest", "reference_store",
    "keep_token_logprobs", "flush_every", "self_check_pairs",
)  # fmt: skip
NOT_LIVE = ("keep_token_logprobs", "flush_every", "self_check_pairs")
# The losses' own options; None means the default of the loss's row.
OPTIONS = ("discopop_tau", "simpo_gamma", "dpop_lambda", "f_alpha")


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
    loss_type: Fixed[str | list[str]] = "sigmoid"
    """sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero, apo_down, discopop, sigmoid_norm, simpo, orpo, dpop or sft; a list of them is added up
    (MPO, Wang et al., 2024: sigmoid, bco_pair and sft), each logged as loss/NAME."""
    loss_weights: Fixed[list[float] | None] = None
    """The coefficients of a list of losses, one each; by default 1."""
    f_divergence: Fixed[Literal[DIVERGENCES]] = "reverse_kl"
    """Divergence from the reference (f-DPO, Wang et al., 2023), for the losses of the difference of
    log-ratios: reverse_kl, forward_kl, js_divergence or alpha_divergence."""
    f_alpha: Fixed[float | None] = None
    """Alpha of alpha_divergence (default 0.5); at 0 it is the forward, at 1 the reverse KL."""
    use_weighting: Fixed[bool] = False
    """Weigh each pair by how likely the policy finds its answers, per token (WPO, Zhou et al.,
    2024)."""
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
        problems = check_options(
            self.loss_type,
            self.loss_options,
            beta=self.beta,
            loss_weights=self.loss_weights,
            f_divergence=self.f_divergence,
        )
        if self.max_prompt_length is not None and self.max_prompt_length >= self.max_length:
            problems.append(
                f"max_prompt_length {self.max_prompt_length} leaves no room for a response in "
                "max_length "
                f"{self.max_length}: lower it"
            )
        if len(self._rows) == len(names_of(self.loss_type)):
            problems += [*self._combination_problems(), *self._reference_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _combination_problems(self) -> list[str]:
        """Return options that a loss of the list cannot be combined with."""
        problems = []
        for row in self._rows:
            if self.ld_alpha is not None and row.lengths:
                problems.append(
                    f"ld_alpha cannot be combined with loss_type={row.name!r}, which divides "
                    "by the lengths itself: remove one"
                )
            if self.use_weighting and row.across_pairs:
                problems.append(
                    f"use_weighting cannot be combined with loss_type={row.name!r}, which sorts "
                    "the pairs, so that a weight belongs to none of them: remove one"
                )
        return problems

    def _reference_problems(self) -> list[str]:
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
    def objective(self) -> dict[str, Any]:
        """The arguments of `preference_terms` besides its tensors."""
        chosen = {"loss_type": self.loss_type, "loss_weights": self.loss_weights}
        return chosen | {"f_divergence": self.f_divergence, "beta": self.beta} | self.loss_options

    @property
    def loss_name(self) -> str:
        """The losses as one text."""
        return " + ".join(names_of(self.loss_type))

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficient of each term of the loss."""
        return coefficients_of(self.loss_type, self.loss_weights, self.nll_coefficient)

    @property
    def _rows(self) -> list[LossRow]:
        return rows_of(self.loss_type)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss reads the reference's log-probs."""
        return any(row.reference for row in self._rows)

    @property
    def looks_across_pairs(self) -> bool:
        """Whether a loss must see all pairs of an optimizer step at once."""
        return any(row.across_pairs for row in self._rows)

    def refuse_values(self, weights: bool, margins: bool) -> None:
        """Raise ConfigError if no loss can use the weights or margins of the data."""
        problems = []
        cure = "leave it out of data.pair_values"
        if (weights or margins) and self.looks_across_pairs:
            name = "weight" if weights else "margin"
            problems.append(
                f"the data has a column {name}, and loss_type={self.loss_name!r} sorts the pairs, "
                f"so that a {name} belongs to none of them: {cure}"
            )
        elif margins and not any(row.margin for row in self._rows):
            takers = ", ".join(row.name for row in LOSSES.values() if row.margin)
            problems.append(
                f"the data has a column margin, which would have no effect with "
                f"loss_type={self.loss_name!r}: {cure}, or choose from {takers}"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def needs_mean_length(self) -> bool:
        """Whether a loss divides by the mean length of the chosen answers of a step."""
        return any(row.mean_lengths for row in self._rows)
