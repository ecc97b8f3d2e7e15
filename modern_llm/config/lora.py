"""`LoraConfig`: train small adapters beside frozen weights (LoRA, arXiv 2106.09685; QLoRA, arXiv
2305.14314)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from modern_llm.config.base import Accepted, Fixed, section

CHANGES_BASE = (
    "changes the frozen weights, so that the model without its adapters would no longer be the "
    "reference"
)
REFUSED = {
    "pissa": CHANGES_BASE,
    "olora": CHANGES_BASE,
    "loftq": CHANGES_BASE,
    "corda": f"reads the data before the first step, and {CHANGES_BASE}",
    "orthogonal": "depends on a decomposition that rounds differently in each process",
    "eva": "reads activations of the data before the first step, for which there is no pass here",
}
"""Ways of `peft` to begin that are refused -> why."""


@section
class LoraConfig:
    """Adapters of SFT and DPO; without this section all weights are trained."""

    rank: Fixed[Annotated[int, Field(gt=0)]] = 16
    """Inner width of each adapter."""
    alpha: Fixed[Annotated[float, Field(gt=0)]] = 32.0
    """The adapter's output is scaled by alpha / rank; with rslora by alpha / sqrt(rank)."""
    dropout: Accepted[Annotated[float, Field(ge=0, lt=1)]] = 0.0
    """Dropout on an adapter's input in SFT; DPO has no dropout and refuses one."""
    targets: Fixed[Literal["all-linear"] | list[str]] = "all-linear"
    """Linear layers that get an adapter, by the end of their names (q_proj, v_proj); all-linear is
    every one but the head."""
    modules_to_save: Fixed[list[str]] = Field(default_factory=list)
    """Modules that are trained whole and saved with the adapters (embed_tokens, lm_head)."""
    dora: Fixed[bool] = False
    """Train the length of every weight's rows beside its direction (DoRA, Liu et al., 2024); not
    with ZeRO-3, and slower."""
    rslora: Fixed[bool] = False
    """Scale an adapter's output by alpha / sqrt(rank), which keeps large ranks from learning slowly
    (rsLoRA, Kalajdzievski, 2023)."""
    initial: Fixed[Literal["default", "gaussian"]] = "default"
    """Distribution of each adapter's first matrix, uniform or normal; the second one begins at 0.
    Those of peft that change the base or read the data first (pissa, olora, corda, loftq, eva) are
    refused."""
    layers: Fixed[list[Annotated[int, Field(ge=0)]] | None] = None
    """Numbers of the decoder layers that get adapters, from 0; by default all."""
    target_parameters: Fixed[list[str]] = Field(default_factory=list)
    """Parameters that get an adapter although they are no linear layer, by the end of their names:
    the experts of a mixture (mlp.experts.gate_up_proj, mlp.experts.down_proj). Not with dropout or
    dora."""
    quantize: Fixed[Literal["nf4", "int8"] | None] = None
    """Keep the frozen weights in 4 or 8 bits (QLoRA): needs a GPU, bitsandbytes and mixed precision
    bf16 or fp16; not with ZeRO-3."""

    @field_validator("initial", mode="before")
    @classmethod
    def _leaves_the_base(cls, value: object) -> object:
        reason = next((why for name, why in REFUSED.items() if str(value).startswith(name)), None)
        if reason is not None:
            raise ValueError(f"{value} {reason}: use default or gaussian")
        return value

    @model_validator(mode="after")
    def _check(self) -> LoraConfig:
        if not self.targets and not self.target_parameters:
            raise ValueError("targets: name at least one layer, or all-linear")
        if self.layers == []:
            raise ValueError("layers: name at least one, or leave it out for all")
        for name, value in (("dropout", self.dropout), ("dora", self.dora)):
            if self.target_parameters and value:
                raise ValueError(
                    f"target_parameters cannot be combined with {name}: an adapter of a parameter "
                    "changes the weight itself; remove one"
                )
        twice = set(self.targets) & set(self.modules_to_save)
        if self.targets != "all-linear" and twice:
            raise ValueError(
                f"targets and modules_to_save both name {', '.join(sorted(twice))}: a module is "
                "trained whole or by an adapter, not both"
            )
        return self
