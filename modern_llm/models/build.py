"""Models of a stock `transformers` architecture from `ModernLLMConfig`, with seeded weights.

Llama has RoPE + RMSNorm + SwiGLU (+ grouped queries); with experts it is Mixtral. So every
checkpoint loads elsewhere without this package.
"""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from modern_llm.config import ModernLLMConfig, MoEConfig


def to_transformers_config(config: ModernLLMConfig) -> PretrainedConfig:
    """Return the `transformers` configuration of the same architecture as `config`."""
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.gqa_groups if config.use_gqa else config.n_heads,
        "intermediate_size": config.ffn_width,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            **(config.rope_scaling or {}),
        },
        "rms_norm_eps": config.rmsnorm_eps,
        "attention_dropout": config.dropout,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_embeddings,
        # The defaults of transformers (1 and 2) may be ordinary tokens. A stage sets the ids of its
        # tokenizer.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if not config.use_moe:
        return LlamaConfig(**shared)
    experts = config.moe_config or MoEConfig()
    return MixtralConfig(
        **shared,
        num_local_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        router_aux_loss_coef=experts.aux_loss_coefficient,
        output_router_logits=experts.aux_loss_coefficient > 0,
        router_jitter_noise=experts.router_jitter,
        sliding_window=None,
    )


def build_model(config: ModernLLMConfig, *, seed: int) -> PreTrainedModel:
    """Return a float32 model on the CPU with weights drawn from `seed`, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return from_transformers_config(to_transformers_config(config))


def from_transformers_config(config: PretrainedConfig) -> PreTrainedModel:
    """Return a float32 model with weights drawn from torch's generator."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
