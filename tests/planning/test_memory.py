"""Planned bytes of weights, gradients and optimizer states are the bytes that engines hold."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from modern_llm.config import LoraConfig, TrainingConfig
from modern_llm.distributed.runtime import start
from modern_llm.models.chunked_mlp import chunk_feed_forward
from modern_llm.models.load import inspect_checkpoint, make_scorer
from modern_llm.models.shapes import decoder_sizes, parameter_shapes
from modern_llm.models.training_mode import recompute_activations
from modern_llm.planning.memory import (
    ParallelLayout,
    Parameter,
    Sizes,
    activation_bytes,
    gradient_bytes,
    optimizer_bytes,
    plan_memory,
    weight_bytes,
)
from modern_llm.planning.planner import with_adapters
from modern_llm.setup.policy import set_up_policy
from modern_llm.training.optimizers import make_optimizer
from tests.distributed.test_frozen_engine import arguments
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import stage, use_deepspeed

# Widths that no number of processes divides: padding is part of what is counted.
ODD = {
    "vocab_size": 97, "hidden_size": 33, "intermediate_size": 43, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "attention_bias": True,
}  # fmt: skip
KINDS = [(None, "no"), (0, "no"), (0, "bf16"), *((n, p) for n in (1, 2, 3) for p in ("no", "bf16"))]
WHOLE = [("float32", "muon"), ("float32", "adafactor"), ("bfloat16", "adamw"), ("bfloat16", "muon")]
if importlib.util.find_spec("bitsandbytes") is not None:
    WHOLE += [("float32", "adamw_8bit"), ("bfloat16", "adamw_8bit")]
"""Weights and optimizers that need whole weights on each process."""
THRESHOLD = 100


def storage(tensors) -> int:
    """Bytes of the memory behind tensors, shared memory once."""
    seen = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in seen.items() if place)


def held(engine) -> dict[str, int]:
    """Bytes that an engine holds before a step, read from its tensors."""
    from modern_llm.distributed.optimizer_shards import base_optimizer

    parameters = list(engine.model.parameters())
    zero = getattr(engine, "stage", 0)
    weights = storage([p.data for p in parameters])
    weights += storage([p.rest for p in parameters if hasattr(p, "rest")])
    states = [value for state in base_optimizer(engine).state.values() for value in state.values()]
    states = [value for value in states if isinstance(value, torch.Tensor)]
    if zero == 0:
        gradients = [p.grad for p in parameters if p.grad is not None]
    elif zero == 3:
        weights += storage([p.ds_tensor for p in parameters])
        states += engine.optimizer.fp32_partitioned_groups_flat
        gradients = [g for part in engine.optimizer.averaged_gradients.values() for g in part]
    else:
        states += engine.optimizer.single_partition_of_fp32_groups
        gradients = [g for part in engine.optimizer.averaged_gradients.values() for g in part]
    return {
        "parameters": weights,
        "gradients": sum(g.numel() * g.element_size() for g in gradients),
        "optimizer": storage(states),
    }


def on_a_rank(folder: Path, kinds: list) -> list[dict[str, int]]:
    results = []
    for number, precision in kinds:
        options = {"stage3_param_persistence_threshold": THRESHOLD} if number == 3 else {}
        use_deepspeed(None if number is None else stage(number, **options), folder)
        config = TrainingConfig(run_name="x", output_dir=folder, mixed_precision=precision)
        runtime = start(config)
        assert torch.distributed.get_world_size() == 2
        scorer = make_scorer(AutoModelForCausalLM.from_config(LlamaConfig(**ODD)))
        engine = runtime.prepare(scorer, make_optimizer(config, scorer))
        engine.model.train()
        for again in (False, True):
            engine.backward(engine.model(*arguments(scorer.model)).logprobs.sum(), last=True)
            if again:
                results.append(held(engine))
            engine.step(1.0)
    return results


@pytest.mark.slow
def test_bytes_equal_what_two_processes_hold(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    parameters = [Parameter(shape) for shape in parameter_shapes(LlamaConfig(**ODD)).values()]
    assert sum(p.numel for p in parameters) % 4 != 0
    for rank, found in enumerate(run_ranks(on_a_rank, 2, tmp_path, KINDS, timeout=200)):
        for (number, precision), bytes_held in zip(KINDS, found, strict=True):
            setting = ParallelLayout(
                world=2, stage=number, precision=precision, persistence_threshold=THRESHOLD
            )
            planned = {
                "parameters": weight_bytes(parameters, setting),
                "gradients": gradient_bytes(parameters, setting),
                "optimizer": optimizer_bytes(parameters, setting),
            }
            assert planned == bytes_held, (rank, number, precision)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "optimizer"), WHOLE)
@pytest.mark.parametrize("lora", [False, True])
def test_bytes_equal_what_one_process_holds(weights, optimizer, lora, tmp_path):
    """Wide enough for moments of 8 bits; embeddings, head and vectors are treated apart."""
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    shape = LlamaConfig(**ODD | {"hidden_size": 90, "intermediate_size": 130})
    adapters = LoraConfig(rank=5, modules_to_save=["lm_head"]) if lora else None
    config = TrainingConfig(
        run_name="x", output_dir=tmp_path, optimizer=optimizer, weights=weights,
        mixed_precision="bf16",
    )  # fmt: skip
    use_deepspeed(None, tmp_path)
    runtime = start(config)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    checkpoint = inspect_checkpoint(tmp_path)
    scorer = set_up_policy(runtime, checkpoint, config, adapters, dropout=False)
    engine = runtime.prepare(scorer, make_optimizer(config, scorer))
    for again in (False, True):
        engine.backward(engine.model(*arguments(scorer.model)).logprobs.sum(), last=True)
        if again:
            found = held(engine)
        engine.step(1.0)
    setting = ParallelLayout(precision="bf16", weights=weights, optimizer=optimizer)
    parameters = with_adapters(parameter_shapes(shape), adapters)
    assert found == {
        "parameters": weight_bytes(parameters, setting),
        "gradients": gradient_bytes(parameters, setting),
        "optimizer": optimizer_bytes(parameters, setting),
    }


def sizes(**changes) -> Sizes:
    return Sizes(**decoder_sizes(LlamaConfig(**(ODD | changes))))


def kept_by(
    layers: int, mode: str, checkpointing: bool, chunk: int | None = None
) -> tuple[int, int]:
    """Bytes that a forward of 256 tokens keeps for its backward, and the casts of weights in it."""
    config = LlamaConfig(**WIDE | {"num_hidden_layers": layers})
    scorer = make_scorer(AutoModelForCausalLM.from_config(config), "blocks", lean=False).train()
    if mode == "weights":
        scorer.to(torch.bfloat16)
    if chunk is not None:
        chunk_feed_forward(scorer.model, chunk)
    if checkpointing:
        recompute_activations(scorer.model)
    parameters = {p.untyped_storage().data_ptr() for p in scorer.parameters()}
    casts = {2 * p.numel() for p in scorer.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in parameters and tensor.numel() >= 256:
            kept[memory.data_ptr()] = memory
        return tensor

    ids = torch.randint(0, 61, (1, 256))
    inputs = ids, torch.arange(256)[None], torch.zeros(1, 256, 2, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        scorer(*inputs, torch.tensor([[0], [1]]))
    found = [memory.nbytes() for memory in kept.values()]
    return sum(n for n in found if n not in casts), sum(n for n in found if n in casts)


WIDE = {
    "vocab_size": 61, "hidden_size": 136, "intermediate_size": 280, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 34, "tie_word_embeddings": False,
}  # fmt: skip
MODES = {
    "float32": ParallelLayout(tokens=256),
    "autocast": ParallelLayout(tokens=256, precision="bf16"),
    "weights": ParallelLayout(tokens=256, precision="bf16", stage=2),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 64])
def test_kept_activations_are_what_autograd_keeps(mode, checkpointing, chunk):
    setting = replace(MODES[mode], checkpointing=checkpointing, mlp_chunk=chunk)
    wide = [Sizes(**decoder_sizes(LlamaConfig(**WIDE | {"num_hidden_layers": n}))) for n in (2, 4)]
    planned = activation_bytes(wide[1], setting) - activation_bytes(wide[0], setting)
    four, two = (kept_by(layers, mode, checkpointing, chunk)[0] for layers in (4, 2))
    measured = four - two
    assert planned == pytest.approx(measured, rel=0.02)


def test_casts_of_weights_under_autocast_are_counted():
    config = LlamaConfig(**WIDE | {"num_hidden_layers": 2})
    parameters = [Parameter(shape) for shape in parameter_shapes(config).values()]
    wide = Sizes(**decoder_sizes(config))
    for mode, setting in MODES.items():
        planned = plan_memory(parameters, wide, setting).device["buffers"]
        if setting.stage is None:
            assert planned == kept_by(2, mode, False)[1], mode
    trained = sum(p.numel for p in parameters)
    alone, two = (
        plan_memory(parameters, wide, ParallelLayout(world=world)).device["buffers"]
        for world in (1, 2)
    )
    assert alone == 0 and two == 4 * trained


def test_parts_move_as_they_must():
    parameters = [Parameter((1000, 1000)) for _ in range(10)]

    def of(**setting):
        return plan_memory(parameters, sizes(), ParallelLayout(**setting))

    alone = of()
    assert alone.device["parameters"] == 40_000_000 and alone.device["gradients"] == 40_000_000
    assert alone.device["optimizer"] == 80_000_000 + 4 * 10
    for number, parts in {1: "optimizer", 2: "optimizer gradients", 3: "optimizer"}.items():
        few, many = (of(world=w, stage=number, persistence_threshold=0) for w in (2, 20))
        for part in parts.split():
            assert many.device[part] < few.device[part] / 9
    offloaded = of(stage=3, world=2, offload_optimizer=True, offload_parameters=True)
    assert not {"optimizer", "gradients", "parameters"} & set(offloaded.device)
    assert offloaded.host["optimizer"] > 0
    moving = of(stage=2, world=4, moving_reference=True)
    assert moving.host == {"reference": 2 * 4 * 10_000_000 // 4}
    assert of().host == {} and of(background_saving=True).host == {"saving": 120_000_000}
    assert of(background_saving=True, world=2, stage=2).host == {"saving": 60_000_000}
    low = of(stage=3, world=2, precision="bf16", reference=True)
    assert low.device["reference"] == low.device["parameters"]
    with_, without = of(checkpointing=True), of()
    assert with_.device["activations"] < without.device["activations"]
    pieces = of(mlp_chunk=4096).device["activations"]
    assert pieces < of(mlp_chunk=8192).device["activations"] < without.device["activations"]
    assert of(mlp_chunk=10**6).device == without.device
    assert of(row=64).device["activations"] > without.device["activations"]
    assert of(targets=10).device["head"] < without.device["head"]
    frozen = [*parameters, Parameter((1000, 1000), trained=False)]
    assert gradient_bytes(frozen, ParallelLayout()) == gradient_bytes(parameters, ParallelLayout())


@pytest.mark.parametrize("script", ["memory_table.py", "plan_table.py"])
def test_a_table_in_the_documentation_is_what_is_computed(script):
    docs = Path(__file__).resolve().parents[2] / "docs" / "reference"
    printed = subprocess.run(
        [sys.executable, docs / script], text=True, capture_output=True, check=True
    )
    assert printed.stdout.strip() in (docs / "memory.md").read_text()
