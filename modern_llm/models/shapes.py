"""Models without weights, and the shapes of their parameters."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a configuration on the meta device; the configuration stays as it is."""
    # A copy: `from_config` writes the dtype into it, in which the weights would be loaded later.
    config = copy.deepcopy(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, tied ones once."""
    return {name: tuple(p.shape) for name, p in empty_model(config).named_parameters()}


def attention_widths(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of attention heads and their width; (0, 0) for a model without attention.

    State-space and recurrent families have no attention heads, and some have no such field.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads <= 0:
        return 0, 0
    width = getattr(config, "head_dim", None)
    return heads, width if isinstance(width, int) else config.hidden_size // heads


def decoder_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Return the sizes of a decoder under the field names of `planning.memory.Sizes`."""
    text = config.get_text_config()
    heads, head_dim = attention_widths(text)
    mlp = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return {
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "mlp": (mlp or 4 * text.hidden_size) * experts,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": head_dim,
        "vocabulary": text.vocab_size,
    }
