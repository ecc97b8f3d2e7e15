"""A whole DPO run equals a plain PyTorch loop: padding, full logits, no packing, no cache."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.plain_dpo import encoded, sums
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

BETA, RATE, BATCH, SEED = 0.1, 3e-4, 8, 7
SETTINGS = {
    "one pair a forward": {"micro_batch_size": 1},
    "small budget": {"tokens_per_micro_batch": 1100},
    "large budget, at most three": {"tokens_per_micro_batch": 8192, "micro_batch_size": 3},
}


@dataclass(frozen=True)
class Case:
    checkpoint: Path
    data: Path
    max_length: int
    steps: int


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    data = write_jsonl(folder / "pairs.jsonl", transcripts(45))
    return Case(checkpoint, data, max_length=64, steps=12)


@pytest.fixture(scope="module")
def real(shared):
    return Case(
        shared / "golden" / "llama" / "policy",
        shared / "data" / "hh_rlhf_sample.jsonl",
        max_length=512,
        steps=20,
    )


def plain_loop(case: Case) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run DPO as a plain loop; return every step's loss and the final weights."""
    from transformers import AutoModelForCausalLM

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(case.checkpoint, dtype=torch.float32) for _ in range(2)
    )
    pairs = encoded(case.checkpoint, case.data, case.max_length)
    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    losses = []
    per_epoch = math.ceil(len(pairs) / BATCH)
    for step in range(case.steps):
        epoch, within = divmod(step, per_epoch)
        key = np.array([SEED, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(pairs))
        batch = [pairs[i] for i in order[within * BATCH : (within + 1) * BATCH]]
        with torch.no_grad():
            frozen = sums(reference, batch)
        ratios = sums(policy, batch) - frozen
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        warm = min(1.0, (step + 1) / 3)
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - 3) / (case.steps - 3)))
        for group in optimizer.param_groups:
            group["lr"] = RATE * (warm if step < 3 else decay)
        optimizer.step()
        losses.append(loss.item())
    return losses, policy.state_dict()


def our_run(case: Case, folder: Path, **settings) -> tuple[list[float], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    from modern_llm.config import TrainingConfig
    from modern_llm.data.preference_datasets import PreferenceDatasetConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    config = TrainingConfig(
        run_name="exact", output_dir=folder, batch_size=BATCH, max_steps=case.steps,
        learning_rate=RATE, warmup_steps=3, weight_decay=0.05, log_every=1, seed=SEED, **settings,
    )  # fmt: skip
    final = run_dpo(
        case.checkpoint,
        config,
        DPOConfig(beta=BETA, max_length=case.max_length),
        PreferenceDatasetConfig(dataset_name=str(case.data)),
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(1, case.steps + 1))
    return [r["loss"] for r in records], load_file(final / "model.safetensors")


def on_a_rank(case: Case, folder: Path) -> dict:
    """Run all settings in the same processes, because starting processes takes longest."""
    import torch.distributed as dist

    results = {}
    for name, settings in SETTINGS.items():
        results[name] = our_run(case, folder / name.replace(" ", "-"), **settings)
        assert dist.get_world_size() == 2
    return results


def assert_same(ours, plain):
    losses, weights = ours
    expected_losses, expected = plain
    assert np.abs(np.array(losses) - np.array(expected_losses)).max() < 1e-5
    assert set(weights) == set(expected)
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("source", ["own", pytest.param("real", marks=pytest.mark.slow)])
def test_a_run_equals_a_plain_loop_on_one_and_two_processes(source, request, tmp_path):
    case = request.getfixturevalue(source)
    plain = plain_loop(case)
    # The run must have changed the weights; otherwise equal weights would show nothing.
    assert abs(plain[0][0] - math.log(2)) < 1e-5
    assert min(plain[0]) < 0.66
    for name, settings in SETTINGS.items():
        assert_same(our_run(case, tmp_path / f"one-{name}", **settings), plain)
    for rank in run_ranks(on_a_rank, 2, case, tmp_path / "two", timeout=280):
        for name in SETTINGS:
            assert_same(rank[name], plain)
