"""`ModernLLMConfig`: the shape of a model made from scratch, in this package's own field names.

`modern_llm.models.build` turns it into a stock architecture of `transformers` (Llama, or Mixtral
with
experts). An option that no stock architecture has is refused here with the reason, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from modern_llm.config.base import Accepted, Fixed, section

Positive = Annotated[int, Field(gt=0)]
# Kinds of rotary scaling, and what each cannot do without.
ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
Share = Annotated[float, Field(ge=0, lt=1)]


@section
class MoEConfig:
    """Experts in place of the feed-forward block (Mixtral)."""

    num_experts: Fixed[Annotated[int, Field(ge=2)]] = 8
    """Experts in each layer."""
    top_k: Fixed[Positive] = 2
    """Experts that each token is sent to."""
    aux_loss_coefficient: Accepted[Annotated[float, Field(ge=0)]] = 0.01
    """Weight of the routers' load-balancing loss in the gradient. Above 0 it is written into the
    checkpoint as enabled (output_router_logits), so that later stages keep it;
    train.router_loss_coefficient sets another one."""
    router_jitter: Accepted[Annotated[float, Field(ge=0)]] = 0.0
    """Multiplicative noise on the router's input while training."""
    capacity_factor: Fixed[float | None] = None
    """No stock architecture drops tokens by capacity: refused when set."""

    @model_validator(mode="after")
    def _check(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k {self.top_k} is above num_experts {self.num_experts}: lower top_k"
            )
        if self.capacity_factor is not None:
            raise ValueError(
                "capacity_factor: Mixtral routes without a capacity and drops no token; leave it "
                "unset"
            )
        return self


@section
class ModernLLMConfig:
    """RoPE + RMSNorm + SwiGLU decoder: Llama, with grouped queries or experts when asked for."""

    vocab_size: Fixed[Positive]
    """Rows of the embedding; at least the tokenizer's size."""
    d_model: Fixed[Positive] = 256
    """Width of the residual stream."""
    n_layers: Fixed[Positive] = 6
    """Decoder layers."""
    n_heads: Fixed[Positive] = 8
    """Query heads; d_model is divided among them."""
    ffn_hidden_size: Fixed[Positive | None] = None
    """Width inside the SwiGLU block; 8/3 of d_model, rounded up to a multiple of 16, unless
    said."""
    max_seq_len: Fixed[Positive] = 1024
    """Positions the model is made for."""
    rope_theta: Fixed[Annotated[float, Field(gt=0)]] = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Fixed[dict[str, Any] | None] = None
    """Rotary scaling as `transformers` spells it, e.g. {"rope_type": "linear", "factor": 2.0}."""
    rmsnorm_eps: Fixed[Annotated[float, Field(gt=0)]] = 1e-5
    """Added to the mean square inside RMSNorm."""
    dropout: Accepted[Share] = 0.0
    """Dropout on attention weights, the only dropout that Llama and Mixtral have; off in DPO."""
    initializer_range: Fixed[Annotated[float, Field(gt=0)]] = 0.02
    """Standard deviation of the initial weights."""
    tie_embeddings: Fixed[bool] = True
    """Use the embedding as the output head too."""
    use_gqa: Fixed[bool] = False
    """Grouped-query attention: fewer key/value heads than query heads."""
    gqa_groups: Fixed[Positive | None] = None
    """Number of key/value heads when use_gqa is on; must divide n_heads."""
    use_moe: Fixed[bool] = False
    """Experts in place of every feed-forward block."""
    moe_config: Fixed[MoEConfig | None] = None
    """The experts; needs use_moe."""
    use_rope: Fixed[bool] = True
    """Rotary positions; no other kind is built."""
    use_swiglu: Fixed[bool] = True
    """SwiGLU feed-forward; no other kind is built."""
    use_attention_sinks: Fixed[bool] = False
    """Attention sinks; no stock Llama or Mixtral has them: refused when on."""

    @model_validator(mode="after")
    def _check(self) -> ModernLLMConfig:
        problems = [text for bad, text in self._rules() if bad]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        groups = self.gqa_groups
        return [
            (
                self.d_model % self.n_heads != 0,
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: change one "
                "of them",
            ),
            (
                self.d_model % self.n_heads == 0 and (self.d_model // self.n_heads) % 2 != 0,
                f"rotary positions need an even head width, got {self.d_model // self.n_heads}",
            ),
            (
                self.use_gqa and groups is None,
                "use_gqa needs gqa_groups, the number of key/value heads",
            ),
            (
                groups is not None and not self.use_gqa,
                "gqa_groups has no effect without use_gqa: set it",
            ),
            (
                groups is not None and self.n_heads % groups != 0,
                f"gqa_groups {groups} does not divide n_heads {self.n_heads}",
            ),
            (
                self.moe_config is not None and not self.use_moe,
                "moe_config has no effect without use_moe: set it",
            ),
            *self._rope_rules(),
            (
                not self.use_rope,
                "use_rope=False: the stock architectures built here are rotary; leave it on",
            ),
            (not self.use_swiglu, "use_swiglu=False: Llama and Mixtral are SwiGLU; leave it on"),
            (
                self.use_attention_sinks,
                "use_attention_sinks: no stock Llama or Mixtral has attention sinks, and a "
                "checkpoint with "
                "them would not load elsewhere; leave it off",
            ),
        ]

    def _rope_rules(self) -> list[tuple[bool, str]]:
        scaling = self.rope_scaling
        if scaling is None:
            return []
        kind = scaling.get("rope_type")
        return [
            (
                kind not in ROPE_NEEDS,
                f"rope_scaling needs rope_type, one of {', '.join(ROPE_NEEDS)}; got {scaling}",
            ),
            *(
                (name not in scaling, f"rope_scaling of rope_type {kind} needs {name}")
                for name in ROPE_NEEDS.get(kind, ())
            ),
            (
                "type" in scaling,
                "rope_scaling: type is the old name and is not read: use rope_type",
            ),
        ]

    @property
    def ffn_width(self) -> int:
        """Width inside the SwiGLU block, the default resolved."""
        return self.ffn_hidden_size or -(-self.d_model * 8 // 3 // 16) * 16
