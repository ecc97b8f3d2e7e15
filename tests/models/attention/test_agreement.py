"""Kernels of a backend are compared with dense attention for exactly the calls of a model."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from modern_llm.models import capabilities
from modern_llm.models.attention import agreement
from modern_llm.models.attention.prefix_tree import Call
from modern_llm.models.load import make_scorer
from tests.helpers.models import SHAPE

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CALLS = [
    Call(4, 4, 32, 32, None, None, None),
    Call(8, 2, 16, 16, 0.2, None, 4096),
    Call(4, 1, 32, 32, None, 30.0, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_agree_within_rounding(dtype):
    assert agreement.why_not("blocks", CALLS, CPU, dtype) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_mask_is_found(dtype, monkeypatch):
    """Kernels that ignore the window, or let each query see one token too many."""
    right = agreement.TreeMasks

    class WithoutWindow(right):
        def __missing__(self, window):
            self[window] = super().__missing__(None if self._backend == "blocks" else window)
            return self[window]

    class OneMore(right):
        def __missing__(self, window):
            mask = super().__missing__(window)
            if self._backend == "mask":  # the other side of the comparison
                mask[:, :, 100:, 20] = 0.0
            return mask

    for wrong, call in ((WithoutWindow, CALLS[1]), (OneMore, CALLS[0])):
        monkeypatch.setattr(agreement, "TreeMasks", wrong)
        why = agreement.why_not("blocks", [call], CPU, dtype)
        assert f"for {call.heads} query heads and {call.key_heads} key heads" in why
        assert "differs from dense attention" in why


def test_a_backward_that_fails_is_a_reason():
    why = agreement.why_not("flex", CALLS[:1], CPU, torch.bfloat16)
    assert why.startswith("its kernel for 4 query heads and 4 key heads of 32 in bfloat16 fails")


@pytest.mark.parametrize("broken", [False, True])
def test_weights_on_the_host_are_probed_with_the_kernels_of_the_device(broken, monkeypatch, caplog):
    """ZeRO-3 and its references: the kernels get the head shapes of the model, not of the twin."""
    asked = []

    def compared(backend, calls, device, dtype):
        asked.append((backend, calls, device, dtype))
        return "its kernel fails" if broken else ""

    monkeypatch.setattr(agreement, "why_not", compared)
    monkeypatch.setattr(capabilities, "_on_device", lambda twin, device: twin)
    config = tf.Gemma2Config(
        **SHAPE | {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 32},
        sliding_window=4096, query_pre_attn_scalar=64, attn_logit_softcapping=50.0,
    )  # fmt: skip
    model = tf.AutoModelForCausalLM.from_config(config)
    scorer = make_scorer(model, device=GPU, dtype=torch.bfloat16)
    assert scorer.capabilities.backend == ("mask" if broken else "flex")
    calls = {Call(16, 1, 32, 32, 0.125, 50.0, window) for window in (4096, None)}
    assert asked == [("flex", calls, GPU, torch.bfloat16)]
    assert broken == any("its kernel fails" in r.getMessage() for r in caplog.records)
