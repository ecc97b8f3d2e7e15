"""Models without weights."""

from __future__ import annotations

import torch
from transformers import LlamaConfig

from modern_llm.models.shapes import empty_model


def test_an_empty_model_leaves_its_configuration_as_it_is():
    """One rank digests the weights before it loads them: all must load them in the same dtype."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    before = config.to_dict()
    model = empty_model(config)
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.is_meta
    assert config.to_dict() == before and config.dtype == torch.bfloat16
