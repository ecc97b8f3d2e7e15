"""The routers' loss is an option of the run, uses the model's own function, and is off by
default."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from modern_llm.config.errors import UserError
from modern_llm.models.load import make_scorer
from tests.helpers.models import (
    SHAPE,
    WITHOUT_HEAD_DIM,
    make_model,
    plain_sums,
    random_pairs,
    score,
)

# Models of expert families without experts.
DENSE = {
    "granite4": lambda: tf.GraniteMoeHybridConfig(
        **WITHOUT_HEAD_DIM, layer_types=["attention"] * 3, num_local_experts=0,
        num_experts_per_tok=0, shared_intermediate_size=64, position_embedding_type="rope",
        router_aux_loss_coef=0.01, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1,
    ),
    "jamba": lambda: tf.JambaConfig(
        **WITHOUT_HEAD_DIM, num_experts=1, num_experts_per_tok=1, attn_layer_period=2,
        attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8, use_mamba_kernels=False,
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        mlp_only_layers=[0, 1, 2],
    ),
}  # fmt: skip


def routed(**settings) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = tf.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None, **settings)
    return tf.AutoModelForCausalLM.from_config(config).eval()


def one_row(scorer):
    """Score a sequence of 15 tokens without targets."""
    ids = torch.arange(3, 18)[None]
    segments = torch.zeros(1, 15, 2, dtype=torch.long)
    none = torch.zeros(2, 0, dtype=torch.long)
    return ids, scorer(ids, torch.arange(15)[None], segments, none)


def test_the_loss_is_the_models_own():
    scorer = make_scorer(routed(), router_loss=0.25)
    ids, output = one_row(scorer)
    expected = routed()(input_ids=ids, output_router_logits=True).aux_loss
    torch.testing.assert_close(output.aux_loss, expected)
    assert scorer.aux_coefficient == 0.25


@pytest.mark.parametrize(
    ("option", "enabled", "weight"),
    [(None, False, 0), (None, True, 0.9), (0.0, True, 0), (0.5, True, 0.5), (0.5, False, 0.5)],
)
def test_it_is_off_unless_the_run_or_the_checkpoint_enables_it(option, enabled, weight):
    model = routed(router_aux_loss_coef=0.9, output_router_logits=enabled)
    scorer = make_scorer(model, router_loss=option)
    assert scorer.aux_coefficient == weight
    assert (one_row(scorer)[1].aux_loss is not None) == (weight > 0)


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense_members_of_expert_families_score_and_have_no_loss(name, enabled):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(DENSE[name]()).eval()
    table = random_pairs([(9, 4, 13), (20, 1, 1)])
    expected = plain_sums(model, table)
    model.config.output_router_logits = enabled
    scorer = make_scorer(model, router_loss=None)
    assert scorer.aux_coefficient == 0
    sums, output = score(scorer, table)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-3)
    assert output.aux_loss is None
    sums.sum().backward()


@pytest.mark.parametrize("make", [lambda: make_model("llama"), lambda: tf.AutoModelForCausalLM.
                                  from_config(DENSE["qwen3_moe"]())])  # fmt: skip
def test_a_loss_that_the_model_does_not_have_is_refused(make):
    with pytest.raises(UserError, match="router_loss_coefficient"):
        make_scorer(make(), router_loss=0.1)
