"""Bounds of the logits are measured on the model, under any field name, with and without a twin."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import CausalLMOutput

from modern_llm.models.load import make_scorer
from modern_llm.models.twin import twin_of
from tests.helpers.models import SHAPE, plain_sums, random_pairs, score


class Bounded(tf.LlamaForCausalLM):
    """A model that applies `bend` to its logits; `bend` has no effect on logits near 0."""

    sealed = False
    """Once true, no other model of this class can be built, so that there is no twin."""

    def __init__(self, config):
        if type(self).sealed:
            raise ValueError("this class is built once")
        super().__init__(config)

    def forward(self, input_ids=None, **inputs):
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        return CausalLMOutput(logits=self.bend(self.head(hidden)))

    def head(self, hidden):
        return self.lm_head(hidden)

    def bend(self, logits):
        return logits


class SoftCap(Bounded):
    def bend(self, logits):
        ceiling = self.config.ceiling
        return ceiling * torch.tanh(logits / ceiling)


class SoftCapOfTheCode(Bounded):
    """The number is not in the configuration."""

    def bend(self, logits):
        return 23.45678 * torch.tanh(logits / 23.45678)


class Clamp(Bounded):
    def bend(self, logits):
        return logits.clamp(-40, 40)


class ClampOfStates(Bounded):
    def head(self, hidden):
        return self.lm_head(hidden.clamp(-9, 9))


class LeakyAbove(Bounded):
    def bend(self, logits):
        return torch.where(logits.abs() > 20, 20 * logits.sign() + (logits - 20) / 2, logits)


KINDS = {"SoftCap": True, "SoftCapOfTheCode": True, "Bounded": True,
         "Clamp": False, "ClampOfStates": False, "LeakyAbove": False}  # fmt: skip


def build(kind, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    shape = SHAPE | {"initializer_range": 0.02, "ceiling": 30.0} | changes
    return kind(tf.LlamaConfig(**shape)).to(dtype).eval()


@pytest.mark.parametrize("with_twin", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_logits_that_grow_after_the_probe_are_those_of_the_model(name, with_twin, monkeypatch):
    kind, table = globals()[name], random_pairs([(20, 9, 6), (3, 2, 5)])
    model = build(kind)
    plain = copy.deepcopy(model)
    monkeypatch.setattr(kind, "sealed", not with_twin)
    scorer = make_scorer(model)
    assert scorer.capabilities.fused is KINDS[name], scorer.capabilities.notes
    assert any("plain logits" in note for note in scorer.capabilities.notes) is not KINDS[name]
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key
    assert not model.model._forward_hooks and not model.lm_head._forward_pre_hooks
    for each in (model, plain):
        with torch.no_grad():
            each.model.norm.weight *= 40
            each.lm_head.weight *= 20
    expected = plain_sums(plain, table)
    torch.testing.assert_close(score(scorer, table)[0].double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("ceiling", [30.3, 30])
def test_sixteen_bits_take_the_number_of_the_configuration(ceiling, monkeypatch):
    model = build(SoftCap, torch.bfloat16, ceiling=ceiling)
    monkeypatch.setattr(SoftCap, "sealed", True)
    assert make_scorer(model).capabilities.fused
    assert model.lm_head.transform.softcap == ceiling


def test_sixteen_bits_without_the_number_keep_plain_logits(monkeypatch):
    model = build(SoftCapOfTheCode, torch.bfloat16)
    monkeypatch.setattr(SoftCapOfTheCode, "sealed", True)
    assert not make_scorer(model).capabilities.fused


def test_a_head_of_zeros_is_measured_on_the_twin_only(monkeypatch):
    model = build(SoftCap)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert make_scorer(model).capabilities.fused
    assert model.lm_head.transform.softcap == 30.0
    model = build(SoftCap)
    torch.nn.init.zeros_(model.lm_head.weight)
    monkeypatch.setattr(SoftCap, "sealed", True)
    assert twin_of(model) is None
    scorer = make_scorer(model)
    assert not scorer.capabilities.fused
    assert "cannot be measured" in "".join(scorer.capabilities.notes)


def test_hooks_are_removed_when_the_model_fails(monkeypatch):
    model = build(SoftCap)
    monkeypatch.setattr(SoftCap, "sealed", True)

    def fails_when_large(self, logits):
        if logits.abs().max() > 10:
            raise RuntimeError("too large")
        return logits

    monkeypatch.setattr(SoftCap, "bend", fails_when_large)
    scorer = make_scorer(model)
    assert not scorer.capabilities.fused
    assert not model.model._forward_hooks and not model.lm_head._forward_pre_hooks
