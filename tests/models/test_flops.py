"""Ideal operations against torch's own counter on plain forwards, and the peaks of devices."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from modern_llm.models.flops import IdealFlops, looked_up, peak_flops
from modern_llm.models.shapes import decoder_sizes
from modern_llm.models.training_mode import decoder_layers
from tests.helpers.models import WITHOUT_HEAD_DIM, make_model

STATE_SPACE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
FAMILIES_WITHOUT_ATTENTION = {
    "mamba": lambda: tf.MambaConfig(**STATE_SPACE),
    "mamba2": lambda: tf.Mamba2Config(**STATE_SPACE, num_heads=8, head_dim=8, n_groups=1),
    "falcon_mamba": lambda: tf.FalconMambaConfig(**STATE_SPACE),
    "rwkv": lambda: tf.RwkvConfig(**STATE_SPACE),
    "xlstm": lambda: tf.xLSTMConfig(**STATE_SPACE, num_heads=2),
}


def counted(model, length: int) -> tuple[float, float]:
    """Return torch's count for one eager forward of a sequence, and for its backward."""
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "gpt2", "gemma2"])
def test_operations_equal_torchs_count_with_full_attention(name):
    length = 12
    model = make_model(name)
    config = model.config.get_text_config()
    ideal = IdealFlops(model)
    # torch counts every (query, key) of eager attention, so ours is told that each token sees all.
    everyone = torch.full((length,), length)
    if name == "gemma2":  # half of its layers see only 4 positions: count all
        ideal._layers = {None: config.num_hidden_layers}
    forward, backward = counted(model, length)
    rotary = forward - ideal(everyone, length, training=False)
    # Rotary tables are a small matrix product in some architectures.
    assert 0 <= rotary <= 0.005 * forward
    total = ideal(everyone, length, training=True)
    assert total == pytest.approx(forward + backward, rel=0.01)


def test_visible_pairs_and_targets_alone_are_counted():
    model = make_model("mistral")  # every layer sees 5 positions
    ideal = IdealFlops(model)
    config = model.config
    reach = torch.arange(1, 11)
    linear = sum(p.numel() for p in decoder_layers(model).parameters() if p.ndim > 1)
    pairs = 1 + 2 + 3 + 4 + 5 * 6
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers * pairs
    head = config.vocab_size * config.hidden_size
    assert ideal(reach, 3, training=False) == 2 * 10 * linear + 2 * 3 * head + attention


def test_experts_that_a_token_does_not_use_are_not_counted():
    model = make_model("mixtral")  # 2 of 4 experts
    every = sum(p.numel() for p in decoder_layers(model).parameters() if p.ndim > 1)
    experts = sum(
        p.numel() for n, p in decoder_layers(model).named_parameters() if ".experts." in n
    )
    assert experts > every / 2
    ideal = IdealFlops(model)
    assert ideal(torch.zeros(1), 0, training=False) == 2 * (every - experts / 2)


@pytest.mark.parametrize("name", FAMILIES_WITHOUT_ATTENTION)
def test_families_without_attention_have_no_operations_of_attention(name):
    config = FAMILIES_WITHOUT_ATTENTION[name]()
    model = AutoModelForCausalLM.from_config(config)
    ideal = IdealFlops(model)
    near, far = (ideal(torch.full((4,), reach), 2, training=False) for reach in (1, 100))
    assert near == far > 0
    sizes = decoder_sizes(config)
    assert sizes["heads"] == 0 or name == "mamba2"
    assert sizes["hidden"] == 32


def test_hybrids_count_only_their_attention_layers():
    config = tf.GraniteMoeHybridConfig(
        **WITHOUT_HEAD_DIM, layer_types=["mamba", "attention", "mamba"], num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=64, mamba_n_heads=8, mamba_d_head=8,
        mamba_n_groups=1,
    )  # fmt: skip
    assert IdealFlops(AutoModelForCausalLM.from_config(config))._layers == {None: 1}


def test_frozen_weights_need_no_gradient_of_their_own():
    model = make_model("llama")
    everything = IdealFlops(model)(torch.ones(4), 2, training=True)
    forward = IdealFlops(model)(torch.ones(4), 2, training=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = IdealFlops(model)(torch.ones(4), 2, training=True)
    assert everything == pytest.approx(3 * forward)
    assert 2 * forward <= frozen < everything


def test_peaks_are_looked_up_or_zero():
    assert peak_flops(torch.device("cpu"), "no") == (0.0, "cpu")
    assert looked_up("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert looked_up("NVIDIA H100 PCIe", "bf16") == 756e12
    assert looked_up("NVIDIA L4", "bf16") == 121e12
    assert looked_up("NVIDIA L40S", "bf16") == 362e12
    assert looked_up("NVIDIA L40", "bf16") == 181e12
    assert looked_up("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert looked_up("NVIDIA A100 80GB PCIe", "bf16") == 312e12
    assert looked_up("NVIDIA A10", "bf16") == 125e12
    assert looked_up("NVIDIA H200 NVL", "bf16") == 835e12
    assert looked_up("NVIDIA GeForce RTX 4090", "bf16") == 165e12
    assert looked_up("A card of tomorrow", "bf16") == 0
    for other in (
        "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L400", "L", "",
    ):  # fmt: skip
        assert looked_up(other, "bf16") == 0, other
    assert looked_up("NVIDIA H100 80GB HBM3", "no") == 0
