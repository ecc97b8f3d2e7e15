"""Runs on rankings equal a plain PyTorch loop over separate rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.evaluation.score import scored_pairs
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import sentence, write_jsonl

BATCH, STEPS, SEED, BETA, LENGTH = 4, 8, 7, 0.5, 64
WHOLE = {"rankings": "whole"}


def rankings(count: int) -> list[dict[str, Any]]:
    """Prompts with two to five responses, some of them tied."""
    rng, rows = random.Random(3), []
    for number in range(count):
        size = 2 + number % 4
        scores = [rng.randint(0, 3) for _ in range(size)]
        scores[0] = 9
        responses = [f" {sentence(rng, 1, 8)} {at}." for at in range(size)]
        rows.append({"prompt": f"{sentence(rng, 2, 9)}:", "responses": responses, "scores": scores})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rankings") / "rows.jsonl", rankings(18))


def our_run(
    checkpoint: Path, data: Path, folder: Path, more: dict[str, Any] | None = None, **train
):
    """Run, and return the logged records."""
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": 1e-3, "schedule": "constant", "weight_decay": 0.0, "log_every": 1,
        "seed": SEED, "tokens_per_micro_batch": 300, "save_every": 1000,
    }  # fmt: skip
    section = dict(more or {})
    dpo = {"loss_type": "plackett_luce", **section.pop("dpo", {})}
    run_dpo(
        checkpoint,
        TrainingConfig(**(fields | train)),
        DPOConfig(beta=BETA, max_length=LENGTH, **dpo),
        PreferenceDatasetConfig(dataset_name=str(data), **(WHOLE | section)),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain_sums(model, tokenizer, row) -> torch.Tensor:
    """Return the log-prob sum of each response, one forward each."""
    prompt, found = tokenizer(row["prompt"])["input_ids"], []
    for response in row["responses"]:
        ids = prompt + tokenizer(response)["input_ids"] + [tokenizer.eos_token_id]
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        each = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        found.append(each[len(prompt) - 1 :].sum())
    return torch.stack(found)


def plain_loop(checkpoint: Path, data: Path) -> tuple[list[float], list[float]]:
    """Return loss and Kendall's tau of every step."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2)
    )
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses, taus = [], []
    per_epoch = -(-len(rows) // BATCH)
    for step in range(STEPS):
        epoch, within = divmod(step, per_epoch)
        key = np.array([SEED, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(len(rows))
        batch = [rows[i] for i in order[within * BATCH : (within + 1) * BATCH]]
        total, tau = torch.zeros(()), 0.0
        for row in batch:
            with torch.no_grad():
                frozen = plain_sums(reference, tokenizer, row)
            r = BETA * (plain_sums(policy, tokenizer, row) - frozen)
            for k, score in enumerate(row["scores"]):
                worse = [r[j] for j, other in enumerate(row["scores"]) if other < score]
                total = total + torch.logsumexp(torch.stack([r[k], *worse]), 0) - r[k]
            signs = [
                torch.sign(r[i] - r[j])
                for i, a in enumerate(row["scores"])
                for j, b in enumerate(row["scores"])
                if a > b
            ]
            tau += torch.stack(signs).mean().item()
        loss = total / len(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        taus.append(tau / len(batch))
    return losses, taus


def same(records, expected) -> None:
    losses, taus = expected
    assert np.abs(np.array([r["loss"] for r in records]) - np.array(losses)).max() < 1e-5
    # Before the first step every reward is 0 but for rounding.
    assert [r["rewards/kendall"] for r in records][1:] == pytest.approx(taus[1:], abs=1e-6)


@pytest.mark.parametrize("attention", ["auto", pytest.param("separate", marks=pytest.mark.slow)])
def test_a_run_equals_a_plain_loop_over_separate_rows(attention, tiny_checkpoint, data, tmp_path):
    expected = plain_loop(tiny_checkpoint, data)
    assert expected[0][-1] < expected[0][0] - 0.05
    for name, settings in {
        "one by one": {"micro_batch_size": 1},
        "small": {"tokens_per_micro_batch": 250},
        "large": {"tokens_per_micro_batch": 4000},
    }.items():
        records = our_run(tiny_checkpoint, data, tmp_path / name, attention=attention, **settings)
        same(records, expected)


def on_a_rank(checkpoint: Path, data: Path, folder: Path) -> list[dict[str, float]]:
    with broken_at(5), pytest.raises(KeyboardInterrupt):
        our_run(checkpoint, data, folder, save_every=2)
    torch.distributed.barrier()
    return our_run(checkpoint, data, folder, save_every=2)


@pytest.mark.slow
def test_two_processes_resume_and_equal_the_plain_loop(tiny_checkpoint, data, tmp_path):
    expected = plain_loop(tiny_checkpoint, data)
    for records in run_ranks(on_a_rank, 2, tiny_checkpoint, data, tmp_path / "two", timeout=250):
        same(records, expected)


def test_rankings_of_two_are_dpo(tiny_checkpoint, tiny_pairs, tmp_path):
    ranked = our_run(tiny_checkpoint, tiny_pairs, tmp_path / "ranked")
    pairs = {"rankings": "best_worst", "dpo": {"loss_type": "sigmoid"}}
    plain = our_run(tiny_checkpoint, tiny_pairs, tmp_path / "pairs", pairs)
    drawn = {"elapsed_s", "tokens_per_second", "memory_gb"}
    for one, other in zip(ranked, plain, strict=True):
        for name in set(other) - drawn:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name


@pytest.mark.slow
def test_all_pairs_are_one_tree_and_evaluation_and_a_moving_reference_work(
    tiny_checkpoint, data, tmp_path
):
    every = {"rankings": "all_pairs", "dpo": {"loss_type": "sigmoid"}}
    grouped = {**every, "dpo": every["dpo"] | {"group_by_prompt": True}}
    apart = our_run(tiny_checkpoint, data, tmp_path / "apart", every, batch_size=10)
    together = our_run(tiny_checkpoint, data, tmp_path / "together", grouped, batch_size=10)
    mean = [np.mean([r["prefix_saving"] for r in records]) for records in (apart, together)]
    assert mean[1] > mean[0] + 0.1
    held = {"eval_fraction": 0.3}
    records = our_run(tiny_checkpoint, data, tmp_path / "held", held, eval_every=4)
    assert all(-1 <= r["eval/rewards/kendall"] <= 1 for r in records if "eval/loss" in r)
    assert sum("eval/loss" in r for r in records) == 2
    moving = {"dpo": {"reference_sync_every": 3, "reference_mixup": 1.0}}
    start = our_run(tiny_checkpoint, data, tmp_path / "moving", moving)
    assert start[3]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert (tmp_path / "moving" / "report.html").is_file()
    live = our_run(tiny_checkpoint, data, tmp_path / "live", {"dpo": {"reference": "model"}})
    stored = our_run(tiny_checkpoint, data, tmp_path / "stored", {"dpo": {"reference": "store"}})
    assert [r["loss"] for r in live] == pytest.approx([r["loss"] for r in stored], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--data.rankings", "whole"], "data.rankings: whole needs a loss of rankings"),
        (["--dpo.loss_type", "plackett_luce"], "set data.rankings: whole (it is best_worst)"),
        (["--dpo.loss_type", "plackett_luce,sft"], "a list of losses cannot be combined"),
        (["--dpo.loss_type", "plackett_luce", "--dpo.ld_alpha", "0.5"], "ld_alpha cannot be"),
        (
            ["--dpo.loss_type", "plackett_luce", "--dpo.use_weighting"],
            "use_weighting cannot be combined",
        ),
        (
            ["--dpo.loss_type", "plackett_luce", "--dpo.f_divergence", "forward_kl"],
            "is not defined for loss_type='plackett_luce'",
        ),
        (["--data.rankings", "best"], "data.rankings"),
    ],
)
def test_bad_settings_are_one_line_before_a_model_is_loaded(options, sentence, tmp_path, capsys):
    arguments = ["dpo", "--sft_checkpoint", str(tmp_path / "none"), "--train.run_name", "x"]
    arguments += ["--train.output_dir", str(tmp_path / "run")]
    arguments += ["--data.dataset_name", str(tmp_path / "none.jsonl")]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and sentence in error, error


def test_margins_and_single_responses_are_refused_with_their_line(
    tiny_checkpoint, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("modern_llm.setup.policy.set_up_policy", None)
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    with_margin = write_jsonl(tmp_path / "margin.jsonl", [row | {"margin": 1.0} for row in rows])
    with pytest.raises(ConfigError, match="a column margin, which would have no effect"):
        our_run(tiny_checkpoint, with_margin, tmp_path / "margin")
    with pytest.raises(ConfigError, match="pairs are scored: use all_pairs"):
        section = PreferenceDatasetConfig(dataset_name=str(data), **WHOLE)
        with scored_pairs(str(tiny_checkpoint), section):
            pass


def test_weights_count_rankings(tiny_checkpoint, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    weighted = [row | {"weight": float(at % 2)} for at, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "weights.jsonl", weighted)
    records = our_run(tiny_checkpoint, path, tmp_path / "run", max_steps=1)
    key = np.array([SEED, 0], dtype=np.uint64)
    first = np.random.Generator(np.random.Philox(key=key)).permutation(len(rows))[:BATCH]
    sizes = [rows[i]["scores"] for i in first if weighted[i]["weight"]]
    expected = [
        sum(np.log(1 + sum(other < score for other in scores)) for score in scores)
        for scores in sizes
    ]
    assert records[0]["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
