"""Differences between the modes of a model are measured: policy and reference are one function."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from modern_llm.models import modes
from modern_llm.models.load import make_scorer
from modern_llm.models.modes import settle
from tests.helpers.models import SHAPE, WITHOUT_HEAD_DIM, plain_sums, random_pairs, score

TOLERANCE = 2e-3
PAIRS = [(20, 9, 6), (3, 12, 5)]


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class SeldomNothing(torch.nn.Module):
    """Has almost no effect on the output; the generator shows it."""

    def forward(self, x):
        return 0 * x if self.training and torch.rand(()) < 1e-4 else x


class Capacity(torch.nn.Module):
    """Capacity for eight tokens of a row, in training."""

    def forward(self, x):
        return x * (torch.arange(x.shape[1])[:, None] < 8) if self.training else x


class Statistics(torch.nn.Module):
    """Writes to a buffer in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean += 1
        return x + self.mean


class Fails(torch.nn.Module):
    def forward(self, x):
        if self.training:
            raise RuntimeError("only for inference")
        return x


def llama_with(extra: torch.nn.Module | None) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE, attention_dropout=0.5))
    if extra is not None:
        norm = model.model.layers[1].post_attention_layernorm
        model.model.layers[1].post_attention_layernorm = torch.nn.Sequential(norm, extra)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Noise, "random"), (SeldomNothing, "random"), (Capacity, "differs"),
     (Statistics, "differs"), (Fails, "fails (only for inference)")],
)  # fmt: skip
def test_a_module_that_does_more_in_training_stays_in_evaluation_mode(kind, reason):
    model = llama_with(kind())
    expected = plain_sums(model, random_pairs(PAIRS))
    before = copy.deepcopy(model.state_dict())
    generators = torch.get_rng_state()
    (note,) = settle([(model, 24, TOLERANCE)], dropout=False)
    assert note.startswith(f"{kind.__name__}: stays in evaluation mode") and reason in note
    assert torch.equal(torch.get_rng_state(), generators)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model.train()
    assert {type(m) for m in model.modules() if not m.training} == {kind}
    torch.testing.assert_close(plain_sums(model, random_pairs(PAIRS)), expected, rtol=0, atol=1e-9)


def test_a_plain_model_is_left_in_both_modes_without_dropout():
    model = llama_with(None)
    assert settle([(model, 24, TOLERANCE)], dropout=False) == []
    assert all(m.training for m in model.train().modules())
    assert not any(m.training for m in model.eval().modules())
    assert model.model.layers[0].self_attn.attention_dropout == 0


def test_with_dropout_differences_in_training_mode_are_kept_and_logged():
    model = llama_with(Noise())
    (note,) = settle([(model, 24, TOLERANCE)], dropout=True)
    assert note.startswith("Noise: draws random numbers in training mode; that is kept")
    assert all(m.training for m in model.train().modules())
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


def test_the_twin_shows_differences_that_need_long_rows(monkeypatch):
    """Both contain the class that only the twin reveals."""
    monkeypatch.setattr(
        Capacity, "forward", lambda self, x: 0 * x if self.training and x.shape[1] > 99 else x
    )
    model, twin = llama_with(Capacity()), llama_with(Capacity())
    settle([(model, 24, TOLERANCE), (twin, 120, TOLERANCE)], dropout=False)
    assert not model.train().model.layers[1].post_attention_layernorm[1].training


EXPERTS = {**WITHOUT_HEAD_DIM, "num_experts_per_tok": 2}
FAMILIES = {
    "mixtral": lambda: tf.MixtralConfig(
        **SHAPE, num_local_experts=4, sliding_window=None, router_jitter_noise=0.4
    ),
    "phimoe": lambda: tf.PhimoeConfig(
        **WITHOUT_HEAD_DIM, num_local_experts=4, input_jitter_noise=0.4, router_jitter_noise=0.4
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=128, layerdrop=0.5, init_std=0.3,
    ),
    # Clamps its own weights in training, which would change them permanently.
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **SHAPE, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        num_kv_shared_layers=1, altup_coef_clip=0.01, laurel_rank=8,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0, 0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_policy_and_reference_of_a_family_are_one_function(name):
    torch.manual_seed(0)
    model, table = tf.AutoModelForCausalLM.from_config(FAMILIES[name]()).eval(), random_pairs(PAIRS)
    expected = plain_sums(model, table)
    scorer = make_scorer(model, "separate", lean=False, dropout=False)
    scorer.train()
    for _ in range(2):
        sums = score(scorer, table)[0].double()
        torch.testing.assert_close(sums.detach(), expected, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_weights_that_an_evaluation_would_change_are_saved_as_they_are():
    """RWKV halves the weights of every second layer in place, in evaluation mode."""
    torch.manual_seed(0)
    config = tf.RwkvConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=5, context_length=128, rescale_every=2
    )
    model, table = tf.RwkvForCausalLM(config).train(), random_pairs(PAIRS)
    before = copy.deepcopy(model.state_dict())
    expected = plain_sums(copy.deepcopy(model).eval(), table)
    scorer = make_scorer(model, "separate", dropout=False)
    assert any("in training mode" in note for note in scorer.capabilities.notes)
    for training in (True, False):
        scorer.train(training)
        torch.testing.assert_close(score(scorer, table)[0].double(), expected, rtol=0, atol=1e-3)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_a_model_that_is_only_scored_is_not_tried_in_training_mode(monkeypatch):
    monkeypatch.setattr(modes, "settle", lambda *of, **more: pytest.fail("asked in training mode"))
    make_scorer(llama_with(None), "separate", lean=False)
