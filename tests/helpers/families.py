"""Tiny random models of every causal-LM family in `transformers`, by the names of their fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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
    "shared_experts_intermediate_size": 32, "linear_head_dim": 8, "linear_num_heads": 4,
    "num_experts_per_token": 2, "local_attention_window_len": 24,
    "encoder_hash_byte_group_vocab": 50, "image_size": 28, "patch_size": 14,
    "hidden_size_global": 32, "mamba_ngroups": 2,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4}
DECODER = {"is_decoder": True}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
# What a family needs besides.
MORE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash "
        "minicpm3 youtu".split(),
        LATENT,
    ),
    **dict.fromkeys(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
        "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl".split(),
        DECODER,
    ),
    "dots3_note_text": LATENT
    | {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "blt": {"vocab_size": 260, "patch_size": 4},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), {"rope_type": "default", "rope_theta": 1e4}
        )
    },
    "dbrx": {
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 64,
        "attn_layers": ["local"] * 2,
        "local_attn_chunk_length": 16,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 6,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_ngroups": 1,
    },
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

# Families that no tiny model is made of, and why.
UNBUILT = {
    "gemma3n": "its vision part needs the package timm, which is no dependency",
    "dots3_note": "its vision part fits one width of text; the text part is dots3_note_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft model: its layers read keys and values of another model",
    ),
    **dict.fromkeys(
        ("musicgen", "musicgen_melody"),
        "a decoder of audio codes: two parts are text models, and neither is the decoder",
    ),
}


def build_family(name: str) -> PreTrainedModel:
    """Return a tiny model of a family; what its classes raise where these fields do not do."""
    default = CONFIG_MAPPING[name]()
    text = default.get_text_config()
    for parts in (True, False):
        try:
            torch.manual_seed(0)
            config = _small(default, text, parts)
            return AutoModelForCausalLM.from_config(config).eval()
        except Exception:
            if not parts:
                raise
    raise AssertionError(name)


def _small(default: Any, text: Any, parts: bool) -> Any:
    """A configuration with small fields: of the text model, and of all its parts if asked."""
    fields = _fields(text)
    for name in default.sub_configs if parts else ():
        part = getattr(default, name, None)
        if isinstance(part, PretrainedConfig) and part is not text and name not in fields:
            fields[name] = _fields(part)
    if type(text) is type(default):
        return type(default)(**fields)
    place = next(n for n in default.sub_configs if type(getattr(default, n, None)) is type(text))
    others = {n: fields.pop(n) for n in list(fields) if n in default.sub_configs}
    return type(default)(**{place: type(text)(**fields).to_dict()}, **others)


def _fields(config: Any) -> dict[str, Any]:
    known = set(config.to_dict()) | set(getattr(config, "attribute_map", {}))
    own = MORE.get(config.model_type, {})
    return {n: v for n, v in FIELDS.items() if n in known} | own
