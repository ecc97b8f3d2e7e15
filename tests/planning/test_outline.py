"""Shapes by arithmetic are those of the model that `transformers` builds."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from modern_llm.config import ModernLLMConfig
from modern_llm.config.errors import UserError
from modern_llm.models.build import build_model
from modern_llm.models.shapes import decoder_sizes
from modern_llm.planning.outline import DENSE, known, outline, outline_of_new
from tests.helpers.models import CONFIGS

VARIANTS = {
    **{name: (name, {}) for name in ("llama", "llama_tied", "mistral", "qwen2", "qwen3")},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", {}),
}


@pytest.mark.parametrize(("name", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_a_folder_has_the_shapes_of_its_model(name, changes, tmp_path):
    config = CONFIGS[name]()
    for field, value in changes.items():
        setattr(config, field, value)
    config.save_pretrained(tmp_path)
    shapes, sizes = outline(str(tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    assert shapes == {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert sizes == decoder_sizes(config)
    # These take the short way; the others are built.
    values = json.loads((tmp_path / "config.json").read_text())
    assert known(values) == (config.model_type in DENSE)


def test_a_file_that_leaves_a_number_out_takes_the_long_way(tmp_path):
    config = CONFIGS["llama"]()
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert not known(values)
    shapes, _ = outline(str(tmp_path))
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (32, 32)  # the class's own default


@pytest.mark.parametrize("changes", [{}, {"use_gqa": True, "gqa_groups": 2}, {"use_moe": True}])
def test_a_new_model_has_the_shapes_that_are_built(changes):
    config = ModernLLMConfig(vocab_size=100, d_model=32, n_layers=2, n_heads=4, **changes)
    shapes, sizes = outline_of_new(config)
    built = build_model(config, seed=0)
    assert shapes == {n: tuple(p.shape) for n, p in built.named_parameters()}
    assert sizes == decoder_sizes(built.config)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no configuration there"):
        outline(str(tmp_path))
