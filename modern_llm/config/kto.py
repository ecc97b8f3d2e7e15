"""`KTOConfig`: the loss of single responses that are labelled desirable or undesirable."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modern_llm.config.base import Fixed, section
from modern_llm.config.reference import ReferenceConfig
from modern_llm.objectives.labelled_catalogue import LABELLED_LOSSES


@section
class KTOConfig(ReferenceConfig):
    """The objective of labelled responses."""

    section_name: ClassVar[str] = "kto"

    beta: Fixed[Annotated[float, Field(gt=0, allow_inf_nan=False)]] = 0.1
    """Strength of the pull to the reference: it scales every reward (Ethayarajh et al., 2024)."""
    loss_type: Fixed[Literal["kto", "apo_zero_unpaired"]] = "kto"
    """kto compares each reward with the policy's KL divergence from the reference, estimated on
    responses of other prompts; apo_zero_unpaired (D'Oosterlinck et al., 2024) with 0."""
    desirable_weight: Fixed[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = 1.0
    """Factor of the loss of desirable responses. With n of each, the paper advises
    desirable_weight * n_desirable of 1 to 4/3 times undesirable_weight * n_undesirable."""
    undesirable_weight: Fixed[Annotated[float, Field(ge=0, allow_inf_nan=False)]] = 1.0
    """Factor of the loss of undesirable responses."""

    @model_validator(mode="after")
    def _check(self) -> KTOConfig:
        problems = [*self.length_problems(), *self.reference_problems()]
        if self.desirable_weight == self.undesirable_weight == 0:
            problems.append(
                "desirable_weight and undesirable_weight are both 0, so that nothing is learnt: "
                "raise one"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def needs_kl(self) -> bool:
        """Whether the loss reads the step's estimate of the KL divergence."""
        return LABELLED_LOSSES[self.loss_type].kl

    @property
    def loss_name(self) -> str:
        """The loss."""
        return self.loss_type

    @property
    def objective(self) -> dict[str, Any]:
        """The arguments of `labelled_loss` besides its tensors."""
        names = ("loss_type", "beta", "desirable_weight", "undesirable_weight")
        return {name: getattr(self, name) for name in names}
