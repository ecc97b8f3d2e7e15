"""Recomputation keeps the promised tensors, and compilation makes one graph, with equal numbers."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from modern_llm.config import TrainingConfig
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.models import training_mode
from modern_llm.models.attention import flex
from modern_llm.models.attention.flex import SIDE
from modern_llm.models.load import make_scorer
from modern_llm.models.shapes import decoder_sizes
from modern_llm.models.training_mode import compile_layers, decoder_layers, recompute_activations
from modern_llm.planning.memory import ParallelLayout, Sizes, activation_bytes, plan_memory
from modern_llm.setup.micro_batches import make_source
from modern_llm.training.tasks.base import shared_metrics, usage_sums
from tests.helpers.models import make_model, plain_sums, random_pairs, score

PAIRS = [(30, 12, 9), (5, 40, 22), (17, 3, 8), (0, 25, 31)]


def gradients(scorer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    sums, _ = score(scorer, random_pairs(PAIRS))
    (sums * torch.tensor([1.0, -0.5])).sum().backward()
    return sums.detach(), {n: p.grad for n, p in scorer.model.named_parameters()}


def recomputed(attention: str, selective: bool | None, *, lean: bool):
    scorer = make_scorer(make_model("llama"), attention, lean=lean)
    scorer.model.train()
    if selective is not None:
        recompute_activations(scorer.model, selective=selective)
    passes = []
    for layer in decoder_layers(scorer.model):
        layer.self_attn.o_proj.register_forward_hook(lambda *_: passes.append(1))
    return (*gradients(scorer), len(passes))


@pytest.mark.parametrize(
    ("attention", "lean"), [("blocks", True), ("blocks", False), ("mask", False)]
)
def test_recomputing_selectively_gives_the_same_gradients(attention, lean):
    sums, expected, forwards = recomputed(attention, None, lean=lean)
    assert forwards == len(decoder_layers(make_model("llama")))
    for selective in (False, True):
        ours, found, times = recomputed(attention, selective, lean=lean)
        assert times == 2 * forwards, "the layers are computed twice"
        torch.testing.assert_close(ours, sums, rtol=1e-6, atol=1e-5)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


class Calls(TorchDispatchMode):
    """Counts matrix products, and the bytes of results that are still referenced."""

    def __init__(self):
        super().__init__()
        self.products = self.alive = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function._schema.name in ("aten::mm", "aten::addmm", "aten::bmm")
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.alive += size

        def gone():
            self.seen.discard(key)
            self.alive -= size

        weakref.finalize(storage, gone)


def work(selective: bool | None, *, offload: bool = False) -> tuple[int, int]:
    """Return the matrix products of forward and backward, and the bytes kept between them."""
    scorer = make_scorer(make_model("llama"), "mask", lean=False)
    scorer.model.train()
    if selective is not None:
        recompute_activations(scorer.model, selective=selective, offload=offload)
    gc.collect()
    calls = Calls()
    with calls:
        sums, _ = score(scorer, random_pairs([(120, 60, 50)] * 4))
        total = sums.sum()
        held = calls.alive
        total.backward()
    return calls.products, held


def test_recomputing_selectively_repeats_no_product_and_keeps_less():
    plain, whole, selective = work(None), work(False), work(True)
    assert whole[0] > plain[0] == selective[0], "products"
    assert whole[1] < selective[1] < 0.85 * plain[1], "bytes between forward and backward"


def test_offloaded_inputs_leave_the_device_and_change_no_number(monkeypatch):
    """An array is the host's memory here: torch does not count it among its tensors."""
    rows = random_pairs([(120, 60, 50)] * 4)

    def trained(**mode) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scorer = make_scorer(make_model("llama"), "mask", lean=False)
        scorer.model.train()
        recompute_activations(scorer.model, **mode)
        sums, _ = score(scorer, rows)
        sums.sum().backward()
        return sums.detach(), {n: p.grad for n, p in scorer.named_parameters()}

    sums, expected = trained()
    found, gradients = trained(offload=True)
    assert torch.equal(found, sums)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    sizes = []

    def to_array(tensor):
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor.detach().numpy().copy()

    before = work(False)
    monkeypatch.setattr(training_mode, "_to_host", to_array)
    monkeypatch.setattr(training_mode, "_to_device", torch.from_numpy)
    after = work(False, offload=True)
    config = make_model("llama").config
    assert len(sizes) == config.num_hidden_layers and after[0] == before[0]
    # The first input is also the embedding's result, and the last layer's stays until its backward.
    assert before[1] - after[1] >= sum(sizes) - 2 * sizes[0]
    tokens = sizes[0] // (4 * config.hidden_size)
    setting = ParallelLayout(tokens=tokens, checkpointing=True, offload_activations=True)
    memory = plan_memory([], Sizes(**decoder_sizes(config)), setting)
    assert memory.host["activations"] == sum(sizes)
    kept = activation_bytes(
        Sizes(**decoder_sizes(config)), replace(setting, offload_activations=False)
    )
    assert kept - memory.device["activations"] == sum(sizes)


@pytest.mark.slow
def test_results_of_compiled_attention_are_kept_by_selective_recomputation():
    """On a GPU the attention of a plain layer is a compiled region, which hides its operators."""
    asked = []

    def policy(context, operator, *of, **more):
        kept = training_mode._kept(context, operator, *of, **more)
        asked.append((context.is_recompute, str(operator), kept))
        return kept

    region = torch.compile(lambda x: x.sin().exp(), options=flex.COMPILER_OPTIONS)
    states = torch.randn(64, requires_grad=True)
    (expected,) = torch.autograd.grad(states.sin().exp().cos().sum(), states)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(lambda x: region(x).cos(), states, use_reentrant=False, context_fn=contexts)
    out.sum().backward()
    found = {(again, kept) for again, name, kept in asked if "inductor_compiled_code" in name}
    assert (False, CheckpointPolicy.MUST_SAVE) in found
    assert {kept for _, kept in found} == {CheckpointPolicy.MUST_SAVE}
    torch.testing.assert_close(states.grad, expected)


BACKENDS = {"blocks": Sharing.LINE, "mask": Sharing.ROWS, "flex": Sharing.LINE}


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_are_compiled_once_for_all_lengths(backend, monkeypatch):
    """With blocks there was a graph for every forward, because their number differs."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_counting(self, **options):
        self._compiled_call_impl = torch.compile(self._call_impl, backend=counting, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_counting)
    torch._dynamo.reset()
    rng = np.random.default_rng(0)
    table = random_pairs(rng.integers(1, 60, (40, 3)).tolist())
    expected = plain_sums(make_model("llama"), table)
    examples = Examples(table, trees=True)
    training = backend != "flex"  # it has no backward on a CPU
    with torch.set_grad_enabled(training):
        scorer = make_scorer(make_model("llama"), backend, lean=False)
        assert scorer.capabilities.backend == backend
        compile_layers(scorer.model)
        made, widths = [], set()
        for _ in range(10):
            chosen = rng.choice(40, int(rng.integers(2, 9)), replace=False)
            batch = collate(examples, chosen, shared=BACKENDS[backend], align=SIDE)
            output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
            sums = batch.sums(output.logprobs)
            torch.testing.assert_close(
                sums.double().detach(), expected[chosen], rtol=1e-5, atol=2e-3
            )
            if training:
                sums.sum().backward()
            widths.add(tuple(batch.ids.shape))
            made.append(len(graphs))
    assert len(widths) >= 4 and made[0] > 0
    assert made[-1] == made[0], f"graphs after each forward: {made}"


def test_compiled_runs_pad_rows_to_a_multiple_and_log_it():
    table = random_pairs(PAIRS)
    runtime = SimpleNamespace(data_rank=0, data_world=1, device=torch.device("cpu"))
    areas = {}
    for compiled in (False, True):
        config = TrainingConfig(
            run_name="c", output_dir=Path("unused"), batch_size=4, compile=compiled
        )
        scorer = make_scorer(make_model("llama"), "blocks", lean=False)
        source = make_source(runtime, config, table, scorer)
        (batch,) = source.micro_batches(0)
        areas[compiled] = batch.area
        usage = shared_metrics({n: float(v) for n, v in usage_sums(batch).items()})
        assert usage["padding"] == pytest.approx(1 - sum(map(sum, PAIRS)) / batch.area)
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        torch.testing.assert_close(
            batch.sums(output.logprobs).double().detach()[np.argsort(batch.examples)],
            plain_sums(make_model("llama"), table),
            rtol=1e-5,
            atol=2e-3,
        )
    assert areas[False] == sum(map(sum, PAIRS))
    assert areas[True] == math.ceil(areas[False] / SIDE) * SIDE > areas[False]
