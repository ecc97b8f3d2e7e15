"""Planned messages are those that DDP and DeepSpeed engines send in a step of two micro-batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from modern_llm.config import TrainingConfig
from modern_llm.distributed.runtime import start
from modern_llm.models.load import make_scorer
from modern_llm.models.shapes import parameter_shapes
from modern_llm.planning import communication
from modern_llm.planning.communication import (
    exchanged_bytes,
    message_bytes,
    sent_by_attention,
    sent_bytes,
)
from modern_llm.planning.memory import ParallelLayout, Parameter, Sizes
from modern_llm.training.optimizers import make_optimizer
from tests.distributed.test_frozen_engine import arguments
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import stage, use_deepspeed
from tests.planning.test_memory import ODD

KINDS = [(n, p, again) for n in (1, 2, 3) for p in ("no", "bf16") for again in (False, True)]
KINDS = [(None, "no", False), *(kind for kind in KINDS if kind[0] == 3 or not kind[2])]
"""Stage, precision, and whether ZeRO-3 gathers again for the backward, as for a large model."""
NAMES = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
}
FORWARDS = 2


def counted(sizes: Counter) -> None:
    """Note the bytes of every collective of this process from now on."""
    for name, kind in NAMES.items():
        real = getattr(dist, name)

        def noted(*tensors, real=real, kind=kind, **more):
            found = [t for t in (*tensors, *more.values()) if hasattr(t, "element_size")]
            sizes[kind] += max(t.numel() * t.element_size() for t in found)
            return real(*tensors, **more)

        setattr(dist, name, noted)


def on_a_rank(folder: Path, kinds: list) -> list[Counter]:
    results, sizes = [], Counter()
    counted(sizes)
    for number, precision, again in kinds:
        options = {"stage3_param_persistence_threshold": 0} if number == 3 else {}
        if again:
            options |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        use_deepspeed(None if number is None else stage(number, **options), folder)
        config = TrainingConfig(run_name="x", output_dir=folder, mixed_precision=precision)
        scorer = make_scorer(AutoModelForCausalLM.from_config(LlamaConfig(**ODD)))
        runtime = start(config)
        engine = runtime.prepare(scorer, make_optimizer(config, scorer))
        engine.model.train()
        for _ in range(2):  # the first step of ZeRO-3 only records the order of modules
            sizes.clear()
            for last in (False, True):
                with engine.forward_backward(last):
                    loss = engine.model(*arguments(scorer.model)).logprobs.sum()
                    engine.backward(loss, last=last)
            engine.step(1.0)
        if number is None:  # DDP's reducer calls its collectives from C++
            sizes["all-reduce"] += sum(map(int, bucket_sizes(engine.model)))
        results.append(Counter(sizes))
    return results


def bucket_sizes(model) -> list[str]:
    return model._get_ddp_logging_data()["bucket_sizes"].split(",")


@pytest.mark.slow
def test_messages_are_those_of_real_engines(tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    parameters = [Parameter(shape) for shape in parameter_shapes(LlamaConfig(**ODD)).values()]
    for found in run_ranks(on_a_rank, 2, tmp_path, KINDS, timeout=250):
        for (number, precision, again), sizes in zip(KINDS, found, strict=True):
            monkeypatch.setattr(communication, "KEPT", 0 if again else 1 << 40)
            setting = ParallelLayout(world=2, stage=number, precision=precision)
            planned = message_bytes(parameters, setting, FORWARDS)
            assert set(planned) <= set(sizes)
            for kind, size in sizes.items():
                # Padding of shards, and scalars: norms and flags of overflow.
                assert size == pytest.approx(planned.get(kind, 0), rel=2e-3, abs=64), (number, kind)


def test_what_a_ring_sends():
    parameters = [Parameter((10, 10)), Parameter((8, 10), trained=False)]

    def of(**setting):
        return sent_bytes(parameters, ParallelLayout(**setting), 3)

    assert of(world=1) == {}
    assert of(world=4) == {"all-reduce": 2 * 3 * 400 // 4}
    assert of(world=2, stage=1, precision="bf16") == {"all-reduce": 200, "all-gather": 100}
    assert of(world=2, stage=2, precision="bf16") == {"all-reduce": 600, "all-gather": 100}
    assert of(world=2, stage=3, precision="bf16") == {
        "all-gather": 3 * 180,
        "reduce-scatter": 3 * 100,
    }


def test_what_attention_sends_where_processes_share_rows():
    sizes = Sizes(layers=3, hidden=32, mlp=64, heads=8, kv_heads=2, head_dim=4, vocabulary=100)
    assert sent_by_attention(sizes, ParallelLayout(world=4), 2) == {}
    layout = ParallelLayout(world=4, sequence_parallel=4, tokens=100, precision="bf16")
    # Queries and results of 8 heads, keys and values of 2 that are repeated to 4.
    assert exchanged_bytes(sizes, layout) == 100 * (8 + 8 + 4 + 4) * 4 * 2 * 3 // 4
    forward = exchanged_bytes(sizes, layout)
    assert sent_by_attention(sizes, layout, 2) == {"all-to-all": 2 * 2 * 3 * forward}
    again = ParallelLayout(sequence_parallel=4, tokens=100, precision="bf16", checkpointing=True)
    assert sent_by_attention(sizes, again, 1) == {"all-to-all": 3 * 3 * forward}
