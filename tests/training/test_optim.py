"""The learning rate is a function of the step; weight decay applies only to matrices."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.training.optim import is_due, learning_rate, set_learning_rate
from modern_llm.training.optimizers import decayed, make_optimizer


def config(**changes):
    fields = {"run_name": "x", "output_dir": Path("x"), "learning_rate": 2.0, "warmup_steps": 4}
    return TrainingConfig(**(fields | changes))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_rises_to_the_peak(schedule):
    rates = [learning_rate(config(schedule=schedule), s, 20) for s in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_decay_follows_its_shape_and_the_last_step_still_learns():
    half_way = 4 + 8
    assert learning_rate(config(), half_way, 20) == pytest.approx(1.0)
    assert learning_rate(config(schedule="linear"), half_way, 20) == pytest.approx(1.0)
    assert learning_rate(config(schedule="constant"), 19, 20) == 2.0
    last = learning_rate(config(), 19, 20)
    assert last == pytest.approx(1 + math.cos(math.pi * 15 / 16))
    assert last > 0
    floor = config(min_learning_rate_ratio=0.25)
    assert learning_rate(floor, 20, 20) == pytest.approx(0.5)
    assert learning_rate(floor, half_way, 20) == pytest.approx(0.5 + 1.5 / 2)


@pytest.mark.parametrize(("ratio", "total", "steps"), [(0.1, 40, 4), (0.07, 100, 7), (0.1, 33, 4)])
def test_a_warm_up_as_a_share_is_the_same_as_its_steps(ratio, total, steps):
    share = config(warmup_steps=0, warmup_ratio=ratio)
    said = config(warmup_steps=steps)
    for step in range(total):
        assert learning_rate(share, step, total) == learning_rate(said, step, total)


def test_two_warm_ups_are_refused():
    with pytest.raises(ValueError, match="warmup_ratio 0.1 and warmup_steps 4 exclude each other"):
        config(warmup_ratio=0.1)
    assert config(warmup_ratio=None).warmup_of(100) == 4


def test_no_warm_up_starts_at_the_peak():
    assert learning_rate(config(warmup_steps=0), 0, 10) == 2.0


def test_decay_is_on_matrices_alone_and_the_step_is_adamws():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    twin = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    twin.load_state_dict(model.state_dict())
    optimizer = make_optimizer(config(weight_decay=0.5), model)
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decays[parameter] == (0.5 if name == "0.weight" else 0.0)
    set_learning_rate(optimizer, 0.1)
    plain = torch.optim.AdamW(
        [
            {"params": [twin[0].weight], "weight_decay": 0.5},
            {"params": [twin[0].bias, *twin[1].parameters()], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=(0.9, 0.95),
        foreach=False,
    )
    x = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    for _ in range(3):
        for m, o in ((model, optimizer), (twin, plain)):
            o.zero_grad()
            m(x).pow(3).sum().backward()
            o.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# Families, with parameters of two or more dimensions that are not used in a matrix product.
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
FAMILIES = {
    "llama": (lambda: tf.LlamaConfig(**SHAPE), 0),
    "gpt2": (lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4), 0),
    "cohere": (lambda: tf.CohereConfig(**SHAPE, use_qk_norm=True), 4),
    "gpt_oss": (lambda: tf.GptOssConfig(**SHAPE, **ROPE, num_local_experts=4), 4),
    "mixtral": (lambda: tf.MixtralConfig(**SHAPE, num_local_experts=4), 0),
    "mamba": (lambda: tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), 2),
    "rwkv": (lambda: tf.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2), 10),
    "jamba": (lambda: tf.JambaConfig(**SHAPE, num_experts=4, use_mamba_kernels=False), None),
    "recurrent_gemma": (lambda: tf.RecurrentGemmaConfig(**SHAPE, attention_window_size=8), None),
    "zamba": (
        lambda: tf.ZambaConfig(
            **SHAPE | {"num_hidden_layers": 4},
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            use_mamba_kernels=False,
        ),
        None,
    ),
    "qwen3_next": (lambda: tf.Qwen3NextConfig(**SHAPE, num_experts=4), None),
}
NEVER = re.compile(r"bias|norm|ln_|A_log|\.D$|sinks|time_|recurrent_param|dt_bias", re.IGNORECASE)


@pytest.mark.parametrize("name", FAMILIES)
def test_decay_depends_on_the_use_of_a_parameter_not_on_its_dimensions(name):
    make, several = FAMILIES[name]
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(make())
    names = decayed(model)
    others = {n: p for n, p in model.named_parameters() if n not in names}
    assert not [n for n in names if NEVER.search(n)]
    assert all(p.ndim < 2 or NEVER.search(n) for n, p in others.items()), others.keys()
    if several is not None:
        assert sum(p.ndim >= 2 for p in others.values()) == several
    assert {n for n, p in model.named_parameters() if p.ndim >= 2} - set(others) == names


def test_adapters_decay_and_what_is_tied_counts_once():
    import peft

    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert "model.embed_tokens.weight" in decayed(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    )
    optimizer = make_optimizer(config(weight_decay=0.1), adapted)
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 2 + 2 * 2


def test_is_due():
    assert [s for s in range(1, 11) if is_due(3, s, 10)] == [3, 6, 9]
    assert [s for s in range(1, 11) if is_due(4, s, 10, at_end=True)] == [4, 8, 10]
