"""A frozen model in its own ZeRO-3 engine: equal numbers, and each rank holds its shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modern_llm.config.errors import ConfigError
from tests.helpers.models import make_model
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import stage, use_deepspeed

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")

KINDS = ["llama", "llama_tied", "gemma2", "mixtral"]


def arguments(model) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 97, (2, 12), generator=generator)
    positions = torch.arange(12).expand(2, -1).contiguous()
    segments = torch.zeros(2, 12, 2, dtype=torch.int64)
    targets = torch.stack([torch.tensor([3, 7, 9, 20]), torch.tensor([5, 6, 7, 8])])
    return ids, positions, segments, targets


def on_a_rank(folder: Path) -> dict:
    from modern_llm.config import TrainingConfig
    from modern_llm.distributed.runtime import start
    from modern_llm.models.load import make_scorer

    small = {"stage3_param_persistence_threshold": 0}
    use_deepspeed(stage(2, **small), folder)
    runtime = start(TrainingConfig(run_name="x", output_dir=folder / "unused"))
    result = {"world": torch.distributed.get_world_size(), "stage": runtime.stage}
    for name in KINDS:
        scorer = make_scorer(make_model(name))
        elements = sum(p.numel() for p in scorer.parameters())
        with torch.inference_mode():
            whole = scorer(*arguments(scorer.model)).logprobs.clone()
        frozen = runtime.freeze(scorer)
        # A rank without work must take part in every forward, with an empty micro-batch.
        empty = (*arguments(scorer.model)[:3], torch.zeros(2, 0, dtype=torch.int64))
        with torch.inference_mode():
            frozen(*(arguments(scorer.model) if runtime.rank == 0 else empty))
            sharded = frozen(*arguments(scorer.model)).logprobs
        held = sum(p.ds_tensor.numel() for p in scorer.parameters())
        now = sum(p.numel() for p in scorer.parameters())
        grads = any(p.requires_grad for p in scorer.parameters())
        result[name] = float((sharded - whole).abs().max()), held / elements, now, grads
        runtime.release(frozen)
        result[f"{name} left"] = sum(p.numel() for p in scorer.parameters())
    return result


@pytest.mark.slow
def test_each_rank_holds_half_of_every_weight(tmp_path):
    for seen in run_ranks(on_a_rank, 2, tmp_path):
        assert (seen["world"], seen["stage"]) == (2, 2)
        for name in KINDS:
            difference, share, gathered, grads = seen[name]
            assert difference < 1e-6, name
            assert share == pytest.approx(0.5, abs=0.01)
            assert gathered == 0 and not grads, "a weight was left whole"
            assert seen[f"{name} left"] == 0


def test_the_references_own_file_is_used(tmp_path):
    from modern_llm.config import TrainingConfig
    from modern_llm.distributed import deepspeed_config
    from modern_llm.distributed import frozen_engine as frozen

    config = TrainingConfig(run_name="x", output_dir=tmp_path)
    policy = deepspeed_config.resolve(stage(2), config, "p")
    file = tmp_path / "zero2.json"
    name = "stage3_param_persistence_threshold"
    assert name not in frozen.engine_config(policy, str(file), config)["zero_optimization"]
    beside = tmp_path / frozen.REFERENCE_FILE
    beside.write_text(json.dumps(stage(3, **{name: 7})))
    taken = frozen.engine_config(policy, str(file), config)["zero_optimization"]
    assert taken["stage"] == 3 and taken[name] == 7
    beside.write_text('{"zero_optimization": {"stage": 3, "stage3_prefetch": 1}}')
    with pytest.raises(ConfigError, match="stage3_prefetch: unknown key"):
        frozen.engine_config(policy, str(file), config)
