"""A key changes with everything a log-prob depends on, and with nothing else."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.reference.keys import NOT_SCORED, entry_key, scoring_recipe, weights_digest
from tests.helpers.models import make_model

ids = st.lists(st.integers(0, 2**31 - 1), max_size=6)


@given(ids, ids, ids, ids)
def test_keys_are_equal_exactly_when_the_ids_are(p, r, q, s):
    one = entry_key(np.array(p, dtype=np.int32), np.array(r, dtype=np.int32))
    other = entry_key(np.array(q, dtype=np.int32), np.array(s, dtype=np.int32))
    assert (one == other) == ((p, r) == (q, s))
    assert len(one) == 16


def test_moving_the_boundary_changes_the_key():
    a, b, c = (np.array(x, dtype=np.int32) for x in ([1, 2], [3], [2, 3]))
    assert entry_key(a, b) != entry_key(a[:1], c)
    # The type of the array that holds the ids does not matter.
    assert entry_key(a.astype(np.int64), b) == entry_key(a, b)


def test_one_bit_of_one_weight_changes_the_digest():
    model = make_model("llama_tied")
    before = weights_digest(model)
    assert weights_digest(make_model("llama_tied")) == before
    with torch.no_grad():
        weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight.view(torch.int32)[3, 5] ^= 1
    assert weights_digest(model) != before


def test_saved_buffers_count_and_unsaved_ones_do_not():
    model = make_model("llama")
    before = weights_digest(model)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert weights_digest(model) == before
    model.register_buffer("bias", torch.zeros(2))
    changed = weights_digest(model)
    assert changed != before
    model.bias[0] = 1
    assert weights_digest(model) not in (before, changed)


def test_names_and_shapes_count():
    class Other(torch.nn.Module):
        def __init__(self, name, *shape):
            super().__init__()
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(*shape)))

    digests = {weights_digest(Other(*args)) for args in [("a", 2, 3), ("a", 3, 2), ("b", 2, 3)]}
    assert len(digests) == 3


def test_the_recipe_changes_with_computation_and_architecture_alone():
    config = make_model("llama").config
    recipe = scoring_recipe(config, "float32")
    assert scoring_recipe(config, "bf16") != recipe
    for name, value in {"eos_token_id": 9, "use_cache": False, "_name_or_path": "x"}.items():
        assert name in NOT_SCORED
        setattr(config, name, value)
    assert scoring_recipe(config, "float32") == recipe
    config.rms_norm_eps *= 2
    assert scoring_recipe(config, "float32") != recipe
