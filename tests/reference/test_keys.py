"""A key changes with everything a log-prob depends on, and with nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from modern_llm.reference.keys import NOT_SCORED, entry_key, entry_keys, scoring_recipe
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


@given(ids, st.lists(ids, max_size=4))
def test_several_answers_of_one_prompt_get_the_keys_that_each_gets_alone(p, answers):
    prompt, *responses = (np.array(x, dtype=np.int32) for x in (p, *answers))
    assert entry_keys(prompt, *responses) == [entry_key(prompt, r) for r in responses]


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
