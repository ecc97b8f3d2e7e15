"""What `plan` says a run needs is what a GPU measures, within 10%."""

from __future__ import annotations

import gc

import pytest
import torch

from modern_llm.config import ModernLLMConfig
from modern_llm.models.build import build_model
from modern_llm.models.load import make_scorer
from modern_llm.planning.memory import ParallelLayout, Parameter, Sizes, plan_memory
from modern_llm.planning.outline import outline_of_new

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_a_step_is_within_ten_percent(checkpointing):
    from modern_llm.models.training_mode import recompute_activations

    config = ModernLLMConfig(
        vocab_size=32_000, d_model=1024, n_layers=16, n_heads=16, ffn_hidden_size=2816,
        max_seq_len=2048, tie_embeddings=False,
    )  # fmt: skip
    rows, length = 4, 2048
    shapes, sizes = outline_of_new(config)
    expected = plan_memory(
        [Parameter(shape) for shape in shapes.values()],
        Sizes(**sizes),
        ParallelLayout(precision="bf16", tokens=rows * length, checkpointing=checkpointing),
    ).device_total
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    scorer = make_scorer(build_model(config, seed=0).cuda())
    if checkpointing:
        recompute_activations(scorer.model)
    scorer.train()
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=1e-5)
    ids = torch.randint(0, config.vocab_size, (rows, length), device="cuda")
    positions = torch.arange(length, device="cuda").expand(rows, length).contiguous()
    trees = torch.arange(rows, device="cuda")[:, None].expand(rows, length)
    segments = torch.stack([trees, torch.zeros_like(trees)], -1)
    sources = torch.arange(rows * length, device="cuda")
    for step in range(2):
        if step:
            torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            output = scorer(ids, positions, segments, torch.stack([sources, ids.flatten()]))
        (-output.logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before
    assert measured == pytest.approx(expected, rel=0.1)
