"""Tiny random models of every causal-LM family in `transformers`, by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LAYERS = 4
# What a configuration gets that has a field of this name; windows are shorter than the rows.
FIELDS = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 24, "sliding_window_size": 24,
    "window_size": 24, "attention_window_size": 24, "attention_chunk_size": 24,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "n_shared_experts": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 16, "index_head_dim": 8, "index_n_heads": 2, "mamba_d_state": 8,
    "mamba_dt_rank": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_mamba_heads": 2,
    "state_size": 8, "lru_width": 32, "use_mamba_kernels": False, "ssm_state_size": 8,
    "n_groups": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "first_k_dense_replace": 1,
    "chunk_size": 16, "ffn_dim": 64, "word_embed_proj_dim": 32, "d_model": 32, "n_embd": 32,
    "n_layer": LAYERS, "n_head": 4, "n_positions": 512, "d_ff": 64, "decoder_layers": 2,
    "encoder_layers": 2, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "mlp_hidden_size": 64, "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64, "zero_expert_num": 1, "moe_topk": 2, "num_layers": LAYERS,
    "attention_hidden_size": 32, "global_head_dim": 8, "d_kv": 8, "conv_kernel": 4,
    "max_window_layers": 1, "embedding_size": 32, "n_inner": 64, "rotary_dim": 4,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4}
DECODER = {"is_decoder": True}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
# What a family needs besides.
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash "
        "minicpm3 youtu dots3_note_text".split(),
        LATENT,
    ),
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
        "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl".split(),
        DECODER,
    ),
    "xmod": {**DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"causal": True},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ALTERNATING},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ALTERNATING},
}


def build_family(name: str) -> PreTrainedModel:
    """Return a tiny model of a family; what its classes raise where these fields do not do."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    text = default.get_text_config()
    known = set(text.to_dict()) | set(getattr(text, "attribute_map", {}))
    fields = {n: v for n, v in FIELDS.items() if n in known} | MORE.get(name, {})
    config = kind(**fields) if type(text) is kind else _around(default, text, fields)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _around(default: Any, text: Any, fields: dict[str, Any]) -> Any:
    """A configuration that holds the text model's beside others."""
    part = next(n for n in default.sub_configs if type(getattr(default, n, None)) is type(text))
    return type(default)(**{part: type(text)(**fields).to_dict()})
