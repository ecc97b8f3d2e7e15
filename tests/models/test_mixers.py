"""Trees in models whose layers carry a state: every mixer runs on one sequence per response."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models import capabilities
from modern_llm.models.load import make_scorer
from modern_llm.models.mixers import Routes, mixers_of, restore_mixers, routed
from modern_llm.models.training_mode import decoder_layers, recompute_activations
from tests.helpers.families import build_family
from tests.helpers.gradients import asked, plain_in
from tests.helpers.models import Table, random_pairs
from tests.models.families_table import MIXED, REFUSED, ROWS, TREES, finding, table

MIXERS = {
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "zamba2": "Zamba2MambaMixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "lfm2": "Lfm2ShortConv",
    "jamba": "JambaMambaMixer",
    "mamba2": "Mamba2Mixer",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
}
SIZES = [(30, 20, 25), (17, 9, 14), (7, 12, 3)]
WEIGHTS = torch.tensor([[1.0, -0.5], [0.25, 2.0], [-1.0, 0.75]], dtype=torch.float64)


class AllFloat64(TorchFunctionMode):
    """Compute in float64 what the code of a model asks to be float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            return args[0].double()
        named = {name: wide(value) for name, value in (kwargs or {}).items()}
        return function(*map(wide, args), **named)


def wide_model(name):
    model = build_family(name).double()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize(
    "name",
    [n if n in ("lfm2", "mamba2") else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS],
)
def test_trees_equal_separate_rows_in_float64(name):
    table, model = random_pairs(SIZES), wide_model(name)
    scorer = make_scorer(copy.deepcopy(model), dropout=False)
    assert scorer.capabilities.trees and scorer.capabilities.mixers == (MIXERS[name],)
    assert MIXERS[name] in "; ".join(scorer.capabilities.notes)
    scorer.model.train()
    with AllFloat64():
        expected, gradients = plain_in(torch.float64, model, table, WEIGHTS)
        for way in (Sharing.ROWS, Sharing.LINE):
            for groups in ([[0, 1, 2]], [[0], [1, 2]]):
                sums, ours = asked(scorer, table, way, groups, WEIGHTS)
                torch.testing.assert_close(sums, expected, rtol=0, atol=1e-9)
                for parameter, gradient in gradients.items():
                    torch.testing.assert_close(ours[parameter], gradient, rtol=1e-9, atol=1e-9)


def forward(scorer, table, indices=(0, 1, 2)):
    batch = collate(Examples(table, trees=True), np.array(indices), shared=Sharing.LINE)
    return scorer(batch.ids, batch.positions, batch.segments, batch.targets).logprobs


@pytest.mark.parametrize("name", ["lfm2", "mamba2"])
def test_an_answer_changes_neither_its_sibling_nor_the_next_tree(name):
    table = random_pairs(SIZES)
    scorer = make_scorer(build_family(name))
    before = forward(scorer, table)
    table.rows[0][1] = table.rows[0][1][::-1].copy()
    after = forward(scorer, table)
    changed = (before != after).nonzero().flatten()
    assert 0 < len(changed) <= SIZES[0][1]


def test_responses_that_share_a_start_are_sequences_of_their_own():
    g = torch.Generator().manual_seed(0)
    prompt, start, *ends = (torch.randint(3, 97, (n,), generator=g).tolist() for n in (9, 40, 7, 5))
    table = Table([[prompt, start + ends[0], start + ends[1]]])
    model = build_family("lfm2")
    expected, gradients = plain_in(torch.float32, copy.deepcopy(model), table, WEIGHTS)
    scorer = make_scorer(model, dropout=False)
    batch = collate(Examples(table, trees=True), np.array([0]), shared=Sharing.LINE)
    assert batch.segments.shape[-1] == 3
    assert [tuple(s.shape) for s in Routes(batch.segments).sequences] == [(2, 56)]
    sums, ours = asked(scorer, table, Sharing.LINE, [[0]], WEIGHTS)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", [{}, {"selective": True}, {"offload": True}])
def test_recomputation_repeats_the_routes_of_its_own_forward(mode):
    table = random_pairs(SIZES)
    found = []
    for recomputes in (False, True):
        scorer = make_scorer(build_family("lfm2"), dropout=False)
        if recomputes:
            recompute_activations(scorer.model, **mode)
        scorer.train()
        logprobs = forward(scorer, table)
        forward(scorer, table, (1,))  # other routes before the backward of the first
        logprobs.sum().backward()
        found.append({n: p.grad for n, p in scorer.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_sequences_of_much_shorter_responses_are_a_group_of_their_own():
    batch = collate(
        Examples(random_pairs([(20, 80, 78), (2, 3, 4)]), trees=True),
        np.arange(2),
        shared=Sharing.LINE,
    )
    routes = Routes(batch.segments)
    assert [tuple(s.shape) for s in routes.sequences] == [(2, 100), (2, 6)]
    ids = torch.arange(batch.ids.numel()).view(batch.ids.shape)
    back = routes.scatter([routes.gather(ids, index) for index in routes.sequences])
    assert torch.equal(back, ids)


def test_without_routes_the_model_is_its_own():
    model = build_family("lfm2")
    ids = torch.arange(3, 23)[None]
    expected = model(input_ids=ids).logits
    scorer = make_scorer(model, lean=False)
    assert {kind.__name__ for kind in mixers_of(model)} == {"Lfm2ShortConv"}
    model.set_attn_implementation("sdpa")
    with routed(None):
        assert torch.equal(model(input_ids=ids).logits, expected)
    restore_mixers(scorer.model)
    assert not mixers_of(model)


class Reversing(nn.Module):
    """A module that mixes the tokens of a row, and is no mixer of any known architecture."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.1 * x.cumsum(1)


def test_an_unknown_mixer_is_found_by_its_results():
    model = build_family("llama")
    for layer in model.model.layers:
        layer.mlp = Reversing(layer.mlp)
    table = random_pairs(SIZES)
    expected, _ = plain_in(torch.float32, copy.deepcopy(model), table, WEIGHTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capabilities, "twin_of", lambda *of: None)  # it is not of the class
        scorer = make_scorer(model, dropout=False)
    assert scorer.capabilities.mixers == ("Reversing",)
    sums, _ = asked(scorer, table, Sharing.LINE, [[0, 1, 2]], WEIGHTS)
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-3)


def test_the_table_of_families_says_how_each_runs_and_why():
    llama, falcon, lfm2, draft = map(finding, ("llama", "falcon", "lfm2", "gemma4_assistant"))
    assert (llama.way, llama.why) == (TREES, "")
    assert (lfm2.way, lfm2.why) == (MIXED, "Lfm2ShortConv")
    assert (falcon.way, falcon.why) == (ROWS, "the architecture has an attention of its own")
    assert draft.way == REFUSED and "draft model" in draft.why
    text = table([llama, falcon, lfm2, draft])
    assert "| trees | 1 |" in text and "| `lfm2` | Lfm2ShortConv |" in text


@pytest.mark.slow
def test_compiled_layers_run_their_mixers_on_sequences():
    table, found = random_pairs(SIZES), []
    for compiled in (False, True):
        scorer = make_scorer(build_family("mamba2"), dropout=False).train()
        if compiled:
            for layer in decoder_layers(scorer.model):
                layer.compile(dynamic=True, backend="eager")
        logprobs = [forward(scorer, table, indices) for indices in ((0, 1, 2), (1,))]
        torch.cat(logprobs).sum().backward()
        found.append((logprobs, {n: p.grad for n, p in scorer.model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
