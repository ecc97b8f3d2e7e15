"""Answers of a batch are those that each prompt gets alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from modern_llm.inference.generate import generate_ids
from tests.helpers.models import CONFIGS, SHAPE, make_model

STATE_SPACE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
               "initializer_range": 0.3}  # fmt: skip
OTHERS = {
    "mamba": lambda: tf.MambaConfig(**STATE_SPACE),
    "mamba2": lambda: tf.Mamba2Config(**STATE_SPACE, num_heads=8, head_dim=8, n_groups=1),
    "rwkv": lambda: tf.RwkvConfig(**STATE_SPACE),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip
TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=2)


def make(name):
    if name in CONFIGS:
        return make_model(name)
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(OTHERS[name]()).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", *OTHERS])
def test_a_batch_answers_as_each_prompt_alone(name):
    model = make(name)
    generator = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(3, 97, (length,), generator=generator).tolist() for length in (3, 11, 3, 7, 1)
    ]
    together = generate_ids(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=4)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate_ids(model, TOKENIZER, [prompt], max_new_tokens=8)
        assert answer == alone
