"""Precision under FSDP2: weights in 16 bits, sums and gradients in float32. Sharded over gloo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard

from modern_llm.config import TrainingConfig
from modern_llm.distributed import frozen_engine, fsdp
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.load import make_scorer
from modern_llm.models.training_mode import decoder_layers
from tests.helpers.models import make_model, random_pairs, score
from tests.helpers.ranks import run_ranks


def config(precision: str) -> TrainingConfig:
    return TrainingConfig(run_name="x", output_dir=Path("unused"), mixed_precision=precision)


def sharded(shard: bool) -> tuple:
    """Return sums, dtypes and one gradient of the policy, sharded or rounded as a reference is."""
    import os

    os.environ |= {"FSDP_VERSION": "2", "ACCELERATE_USE_FSDP": "true"}
    torch.distributed.init_process_group("gloo")
    policy = fsdp.plugin(config("bf16")).mixed_precision_policy
    scorer = make_scorer(make_model("llama"), lean=False)
    if shard:
        for layer in decoder_layers(scorer.model):
            fully_shard(layer, mp_policy=policy)
        fully_shard(scorer, mp_policy=policy)
    else:
        frozen_engine.round_parameters(scorer, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        sums, output = score(scorer, random_pairs([(6, 30, 5), (2, 40, 11)]))
    sums.sum().backward()
    grad = scorer.model.get_output_embeddings().weight.grad
    grad = grad.full_tensor() if shard else grad
    dtypes = [output.parts.dtype, grad.dtype, policy.reduce_dtype, policy.output_dtype]
    return sums.detach(), dtypes, grad.float()


@pytest.mark.slow
def test_the_policy_and_its_reference_compute_with_the_same_weights():
    (sums, dtypes, grad), (rounded, _, expected) = (
        run_ranks(sharded, 1, shard, timeout=120)[0] for shard in (True, False)
    )
    assert dtypes == [torch.float32] * 4
    torch.testing.assert_close(sums, rounded, rtol=0, atol=0)
    assert not torch.equal(sums, sums.bfloat16().float()), "sums are rounded to bfloat16"
    torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_recipe_names_the_weights_that_are_used(precision):
    state = SimpleNamespace(deepspeed_plugin=None)
    accelerator = SimpleNamespace(
        process_index=0, num_processes=1, device=torch.device("cpu"), state=state,
        distributed_type=DistributedType.FSDP,
    )  # fmt: skip
    runtime = Runtime(accelerator, config(precision))
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    name = "float32" if precision == "no" else f"{precision}-autocast-weights"
    assert runtime.forward_dtype == name
    assert runtime.rounds_weights == (precision != "no")
    scorer = make_scorer(make_model("llama"), "separate")
    buffers = {name: buffer.dtype for name, buffer in scorer.named_buffers()}
    runtime.freeze(scorer)
    assert {p.dtype for p in scorer.parameters()} == {low}
    assert {name: buffer.dtype for name, buffer in scorer.named_buffers()} == buffers


def sharing_rows(size: int) -> tuple:
    """Return sums and gradients where `size` processes shard the weights and share the rows."""
    from modern_llm.distributed.sequence_group import sequence_group

    torch.distributed.init_process_group("gloo")
    scorer = make_scorer(make_model("llama"), sequence=sequence_group(size))
    for layer in decoder_layers(scorer.model):
        fully_shard(layer)
    fully_shard(scorer)
    sums, _ = score(scorer, random_pairs([(6, 30, 5), (2, 40, 11)]))
    # The loop's factor: FSDP averages over all processes.
    (sums.sum() * torch.distributed.get_world_size()).backward()
    return sums.detach(), {n: p.grad.full_tensor() for n, p in scorer.named_parameters()}


@pytest.mark.slow
def test_processes_that_share_rows_give_the_gradient_of_one():
    scorer = make_scorer(make_model("llama"))
    expected, _ = score(scorer, random_pairs([(6, 30, 5), (2, 40, 11)]))
    expected.sum().backward()
    for sums, grads in run_ranks(sharing_rows, 2, 2, timeout=120):
        torch.testing.assert_close(sums, expected.detach(), rtol=1e-5, atol=1e-5)
        for name, parameter in scorer.named_parameters():
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-4)
