"""`DPOConfig`: which preference loss, with what options, against which reference.

Its options are judged by the catalogue of losses: one that a loss does not take is refused here,
when the section is built, and not ignored later.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modern_llm.config.base import Fixed, section
from modern_llm.config.errors import ConfigError
from modern_llm.config.reference import ReferenceConfig
from modern_llm.objectives.catalogue import (
    DIVERGENCES,
    LOSSES,
    LossRow,
    check_options,
    coefficients_of,
    names_of,
    rows_of,
)

# The losses' own options; None means the default of the loss's row.
OPTIONS = ("discopop_tau", "simpo_gamma", "dpop_lambda", "f_alpha")


@section
class DPOConfig(ReferenceConfig):
    """The preference objective."""

    section_name: ClassVar[str] = "dpo"

    beta: Fixed[float] = 0.1
    """Strength of the pull to the reference (Rafailov et al., 2023); the weight of the odds term
    in orpo."""
    label_smoothing: Fixed[float] = 0.0
    """Share of pairs assumed to be labelled the wrong way round. exo_pair needs a positive value:
    with it, 0 means its default of 0.001."""
    loss_type: Fixed[str | list[str]] = "sigmoid"
    """sigmoid, robust, hinge, ipo, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
    apo_zero, apo_down, discopop, sigmoid_norm, simpo, orpo, dpop or sft; a list of them is added up
    (MPO, Wang et al., 2024: sigmoid, bco_pair and sft), each logged as loss/NAME. plackett_luce is
    the loss of rankings, with data.rankings: whole."""
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
    reference_sync_every: Fixed[Annotated[int, Field(gt=0)] | None] = None
    """Optimizer steps after which the reference moves towards the policy (TR-DPO, Gorbatovski et
    al., 2024): a copy of the trained weights on the host is mixed, and the pairs of the next steps
    are scored with it. By default the reference never moves. Evaluations keep the first one."""
    reference_mixup: Fixed[Annotated[float, Field(gt=0, le=1)] | None] = None
    """Weight of the policy in a moved reference (default 0.6, the rest is the old reference); 1
    copies the policy."""

    @model_validator(mode="after")
    def _check(self) -> DPOConfig:
        problems = check_options(
            self.loss_type,
            self.loss_options,
            beta=self.beta,
            loss_weights=self.loss_weights,
            f_divergence=self.f_divergence,
        )
        problems += self.length_problems()
        if len(self._rows) == len(names_of(self.loss_type)):
            problems += [*self._combination_problems(), *self.reference_problems()]
        if self.needs_reference:
            problems += self._moving_problems()
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
            pairs_alone = {
                "ld_alpha": self.ld_alpha is not None,
                "use_weighting": self.use_weighting,
                "a list of losses": len(self._rows) > 1,
            }
            problems += [
                f"{option} cannot be combined with loss_type={row.name!r}, a loss of rankings: "
                "remove one"
                for option, is_set in pairs_alone.items()
                if row.ranking and is_set
            ]
            if self.use_weighting and row.across_pairs:
                problems.append(
                    f"use_weighting cannot be combined with loss_type={row.name!r}, which sorts "
                    "the pairs, so that a weight belongs to none of them: remove one"
                )
        return problems

    def _moving_problems(self) -> list[str]:
        """Return what contradicts a reference that moves."""
        if self.reference_sync_every is None:
            without = "reference_mixup has no effect without reference_sync_every: remove it"
            return [without] if self.reference_mixup is not None else []
        problems = []
        if self.reference != "cache":
            problems.append(
                f"reference_sync_every cannot be combined with reference: {self.reference}: a "
                "reference that moves is scored during the run; use reference: cache"
            )
        if self.reference_checkpoint is not None:
            problems.append(
                "reference_sync_every moves a copy of the policy's start: remove "
                "reference_checkpoint"
            )
        return problems

    @property
    def reference_alpha(self) -> float:
        """Weight of the policy when the reference moves; that of TRL by default."""
        return 0.6 if self.reference_mixup is None else self.reference_mixup

    @property
    def tail_weight(self) -> float | None:
        """`ld_alpha`."""
        return self.ld_alpha

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

    def refuse_rankings(self, rankings: str) -> None:
        """Raise ConfigError if the loss and `data.rankings` do not fit each other."""
        takers = ", ".join(row.name for row in LOSSES.values() if row.ranking)
        if (rankings == "whole") == any(row.ranking for row in self._rows):
            return
        if rankings == "whole":
            raise ConfigError(
                [
                    f"data.rankings: whole needs a loss of rankings ({takers}), and dpo.loss_type "
                    f"is {self.loss_name}: change one, or use data.rankings: all_pairs"
                ]
            )
        raise ConfigError(
            [
                f"dpo.loss_type {self.loss_name} is a loss of rankings: set data.rankings: whole "
                f"(it is {rankings})"
            ]
        )

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
