"""Features that have an effect only at some lengths or weights are measured there, on a twin."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf

from modern_llm.config.errors import UserError
from modern_llm.models.attention import flex
from modern_llm.models.capabilities import probe
from modern_llm.models.load import make_scorer
from modern_llm.models.twin import twin_of
from tests.helpers.models import SHAPE, WITHOUT_HEAD_DIM, plain_sums, random_pairs, score

LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 32, "index_topk": 16, "index_head_dim": 8,
    "index_n_heads": 2,
}  # fmt: skip
LONGER = {"max_position_embeddings": 512}
# name -> configuration, and the capability that must be off.
FAMILIES = {
    # The window is only in the mask: layers do not pass it to their attention.
    "phimoe": (
        lambda: tf.PhimoeConfig(
            **WITHOUT_HEAD_DIM | LONGER, num_local_experts=4, sliding_window=64
        ),
        "trees",
    ),
    "qwen2_moe": (
        lambda: tf.Qwen2MoeConfig(
            **WITHOUT_HEAD_DIM | LONGER, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, shared_expert_intermediate_size=32, sliding_window=64,
            use_sliding_window=True, max_window_layers=1,
        ),
        "trees",
    ),
    # A number of keys that each token keeps, far above the rows of a short probe.
    "doge": (lambda: tf.DogeConfig(**WITHOUT_HEAD_DIM | LONGER, keep_window_size=100), "trees"),
    # Ties among the kept keys, which padding decides.
    "deepseek_v32": (
        lambda: tf.DeepseekV32Config(**WITHOUT_HEAD_DIM | LONGER | LATENT
                                     | {"num_key_value_heads": 4}),
        "padded",
    ),
    # Positions start at the padding id + 1.
    "camembert": (
        lambda: tf.CamembertConfig(**WITHOUT_HEAD_DIM | LONGER, is_decoder=True),
        "trees",
    ),
}  # fmt: skip


def make(config) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_beyond_every_special_length_are_scored_as_plain_sequences(name):
    config, off = FAMILIES[name]
    model, table = make(config()), random_pairs([(90, 40, 60), (5, 70, 3)])
    expected = plain_sums(model, table)
    scorer = make_scorer(model)
    assert not getattr(scorer.capabilities, off), scorer.capabilities
    assert scorer.capabilities.notes
    torch.testing.assert_close(score(scorer, table)[0].double(), expected, rtol=0, atol=1e-3)


def test_a_cap_without_effect_on_new_weights_is_found_and_kept():
    """A cap of 30 under another field name; the logits grow later."""
    model = make(
        tf.RecurrentGemmaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, lru_width=64,
            attention_window_size=64, block_types=["recurrent", "recurrent", "attention"],
            logits_soft_cap=30.0, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        )
    )  # fmt: skip
    plain, table = copy.deepcopy(model), random_pairs([(20, 9, 6)])
    scorer = make_scorer(model)
    with torch.no_grad():
        for each in (plain, model):
            each.get_output_embeddings().weight *= 200
    expected = plain_sums(plain, table)
    torch.testing.assert_close(score(scorer, table)[0].double(), expected, rtol=1e-5, atol=1e-3)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(UserError, match="later tokens"):
        make_scorer(make(tf.BertConfig(**WITHOUT_HEAD_DIM)))


def test_a_refused_backend_is_one_warning_with_its_reason(monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise NotImplementedError("no kernel for 64 heads")

    monkeypatch.setattr(flex, "attend", broken)
    with caplog.at_level("INFO", logger="modern_llm"):
        capabilities = probe(make(tf.LlamaConfig(**SHAPE)), tried=("flex", "mask"))
    assert capabilities.trees and capabilities.backend == "mask"
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == [
        "warning: LlamaForCausalLM: attention mask, which is slower: flex is refused, because the "
        "tree attention does not run in it (no kernel for 64 heads)"
    ]
    assert len([r for r in caplog.records if "no kernel" in r.getMessage()]) == 1


def test_a_twin_is_small_and_keeps_one_layer_of_each_kind():
    config = tf.Gemma3TextConfig(
        **SHAPE | {"num_hidden_layers": 12, "hidden_size": 2048, "num_attention_heads": 8,
                   "intermediate_size": 8192, "head_dim": 256, "max_position_embeddings": 8192},
        sliding_window=4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    state = torch.random.get_rng_state()
    twin = twin_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert twin.num_parameters() < 1_000_000
    assert twin.config.layer_types == config.layer_types[:6]
    assert twin.config.sliding_window < 25
    assert config.sliding_window == 4096
