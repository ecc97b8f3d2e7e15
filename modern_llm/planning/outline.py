"""Parameter shapes of a model from its configuration, for planning.

The `config.json` of a Llama, Mistral or Qwen is read as it is: of a 70B model that takes 0.2 s of
processor time, and 4.3 s on torch's meta device, most of it imports. Every other architecture is
built on the meta device (`models.shapes`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modern_llm.config import ModernLLMConfig
from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line
from modern_llm.storage.regular_files import read_text

# model type -> (a bias on queries, keys and values always, norms on queries and keys)
DENSE = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}
# Fields that the file must have: only the class of the architecture knows their defaults.
NEEDED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
Shapes = dict[str, tuple[int, ...]]


def outline(place: str) -> tuple[Shapes, dict[str, int]]:
    """Return the shape of every parameter of a Hub id, folder or `.pt` file by name, tied ones
    once, and the widths of the decoder under the field names of `planning.memory.Sizes`.

    Raises:
        UserError: there is no configuration, or not one of a decoder.
    """
    if Path(place).name == "last":
        from modern_llm.models.run_checkpoint import checkpoint_folder

        place = checkpoint_folder(place)
    if not place.endswith(".pt"):
        values = _read(place)
        if known(values):
            return shapes_of(values)
    from modern_llm.models.load import inspect_checkpoint
    from modern_llm.models.shapes import decoder_sizes, parameter_shapes

    config = inspect_checkpoint(place).config
    try:
        return parameter_shapes(config), decoder_sizes(config)
    except (AttributeError, TypeError) as error:
        raise UserError(
            f"model {place}: its configuration has other fields than a decoder's ({error})"
        ) from error


def known(values: Mapping[str, Any]) -> bool:
    """Return whether `shapes_of` can read a configuration: its architecture and every number."""
    return (
        values.get("model_type") in DENSE
        and "auto_map" not in values
        and all(values.get(name) is not None for name in NEEDED)
    )


def outline_of_new(config: ModernLLMConfig) -> tuple[Shapes, dict[str, int]]:
    """Return the same for a model that is trained from scratch."""
    if config.use_moe:
        from modern_llm.models.build import to_transformers_config
        from modern_llm.models.shapes import decoder_sizes, parameter_shapes

        built = to_transformers_config(config)
        return parameter_shapes(built), decoder_sizes(built)
    return shapes_of(
        {
            "model_type": "llama",
            "hidden_size": config.d_model,
            "intermediate_size": config.ffn_width,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.gqa_groups or config.n_heads,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_embeddings,
        }
    )


def _read(place: str) -> dict[str, Any]:
    """Return the `config.json` of a folder or of a model of the Hub."""
    try:
        if Path(place).is_dir():
            file = Path(place) / "config.json"
        else:
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(place, "config.json"))
        found = json.loads(read_text(file))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {place}: no configuration there, and none that the Hub gives "
            f"({first_line(error)}); check the path or the id"
        ) from error
    return found if isinstance(found, dict) else {}


def shapes_of(config: Mapping[str, Any]) -> tuple[Shapes, dict[str, int]]:
    """Return shapes and widths from the values of a `config.json` that is `known`."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    sizes = {
        "layers": config["num_hidden_layers"],
        "hidden": hidden,
        "mlp": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocabulary": config["vocab_size"],
    }
    ends = (config["vocab_size"], hidden)
    layer = _layer(config, sizes)
    shapes: Shapes = {"model.embed_tokens.weight": ends}
    for number in range(sizes["layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = ends
    return shapes, sizes


def _layer(config: Mapping[str, Any], sizes: dict[str, int]) -> Shapes:
    hidden, mlp, width = sizes["hidden"], sizes["mlp"], sizes["head_dim"]
    queries, keys = sizes["heads"] * width, sizes["kv_heads"] * width
    always, norms = DENSE[config["model_type"]]
    everywhere, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    linear = {  # name: shape of the weight, whether there is a bias
        "self_attn.q_proj": ((queries, hidden), everywhere or always),
        "self_attn.k_proj": ((keys, hidden), everywhere or always),
        "self_attn.v_proj": ((keys, hidden), everywhere or always),
        "self_attn.o_proj": ((hidden, queries), everywhere),
        "mlp.gate_proj": ((mlp, hidden), mlp_bias),
        "mlp.up_proj": ((mlp, hidden), mlp_bias),
        "mlp.down_proj": ((hidden, mlp), mlp_bias),
    }
    gains = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if norms:
        gains |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    shapes: Shapes = {f"{name}.weight": shape for name, (shape, _) in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, (shape, bias) in linear.items() if bias}
    return shapes | {f"{name}.weight": (size,) for name, size in gains.items()}
