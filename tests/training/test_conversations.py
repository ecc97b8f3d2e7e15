"""Runs on whole conversations, against log-probs in plain PyTorch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modern_llm import DPOConfig, TrainingConfig, run_dpo, run_sft
from modern_llm.config import (
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.table.build import prepare_tables
from modern_llm.evaluation.score import score_pairs
from modern_llm.models.load import make_scorer
from modern_llm.objectives.preference import preference_loss
from modern_llm.training.train_kto import KTOConfig, run_kto
from tests.helpers.conversations import (
    COMMON,
    MARKED,
    PAIRS,
    SHARED_TURNS,
    TALKS,
    TOOLS,
    answer,
    call,
    plain,
    result,
    sides_of,
    user,
)
from tests.helpers.encoding import byte_level
from tests.helpers.text import write_jsonl


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The folder of a small Llama with a tokenizer whose template marks the assistant's turns."""
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level(chat=MARKED)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plain_sums(folder: Any, row: dict[str, Any], shared: int) -> list[tuple[float, int]]:
    """Log-prob sum and number of the assistant's tokens of each conversation, in plain PyTorch."""
    tokenizer = byte_level(chat=MARKED)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sides = sides_of(row) if "chosen" in row else [row["messages"]]
    found = []
    for messages in sides:
        ids, mask = plain(tokenizer, messages, row.get("tools"), shared)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [at for at, trained in enumerate(mask) if trained]
        found.append((sum(float(logprobs[at - 1, ids[at]]) for at in places), len(places)))
    return found


@pytest.mark.slow
def test_scores_are_those_of_plain_pytorch(tmp_path, model):
    data = PreferenceDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", PAIRS)), targets="all"
    )
    score_pairs(str(model), data, tmp_path / "scores.jsonl", max_length=1024)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    for line, row, shared in zip(map(json.loads, lines), PAIRS, SHARED_TURNS, strict=True):
        for side, (total, count) in zip(
            ("chosen", "rejected"), plain_sums(model, row, shared), strict=True
        ):
            assert line[f"{side}_tokens"] == count
            assert line[f"policy_{side}"] == pytest.approx(total, rel=1e-5)


def rows_of(folder: Any, rows: list[dict[str, Any]]) -> str:
    return str(write_jsonl(folder / "rows.jsonl", rows))


def logged(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dpo_counts_trained_tokens_alone(tmp_path, model):
    fields = {"batch_size": len(PAIRS), "max_steps": 2, "log_every": 1, "learning_rate": 1e-3}
    data = PreferenceDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", PAIRS)), targets="all"
    )
    train = TrainingConfig(run_name="a", output_dir=tmp_path / "simpo", **fields)
    run_dpo(model, train, DPOConfig(loss_type="simpo", beta=2.0, max_length=1024), data)
    both = [plain_sums(model, row, n) for row, n in zip(PAIRS, SHARED_TURNS, strict=True)]
    policy = torch.tensor([[total for total, _ in pair] for pair in both])
    lengths = torch.tensor([[count for _, count in pair] for pair in both])
    losses = preference_loss(
        policy, None, lengths, loss_type="simpo", beta=2.0, label_smoothing=0.0
    )
    assert logged(tmp_path / "simpo")[0]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    # With a stored reference: it starts at ln 2, in trees as in rows of one answer.
    train = TrainingConfig(run_name="b", output_dir=tmp_path / "dpo", **fields)
    run_dpo(model, train, DPOConfig(max_length=1024), data)
    assert logged(tmp_path / "dpo")[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


LONG = "The harbour lies behind the hill, and the ships come in with the tide."
TRAJECTORIES = [
    {
        "tools": TOOLS,
        "prompt": COMMON[:1],
        "responses": [
            [COMMON[1], result(LONG), answer("It is 5.")],
            [COMMON[1], result(LONG), answer("It is 6?", reasoning_content="Six.")],
            [call("Other.", 3), result("5"), answer("Five.")],
            [COMMON[1], result(LONG), call(LONG, 7), result("7"), answer("Seven.")],
        ],
        "scores": [3, 2, 1, 0],
    },
    {"prompt": "Hi", "responses": [[answer("a"), user("b"), answer("c")], "d"], "ranks": [2, 1]},
]


def sums_of_trajectories(folder: Any) -> list[list[tuple[float, int]]]:
    """Sum and number of trained tokens of each response of `TRAJECTORIES`, the best one first."""
    found = []
    for row in TRAJECTORIES:
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [user(row["prompt"])]
        order = np.argsort([-score for score in row.get("scores", [])] or row["ranks"])
        turns = [row["responses"][at] for at in order]
        sides = [[*prompt, *([answer(t)] if isinstance(t, str) else t)] for t in turns]
        rows = [{"messages": side, "tools": row.get("tools")} for side in sides]
        found.append([plain_sums(folder, each, len(prompt))[0] for each in rows])
    return found


@pytest.mark.slow
def test_trajectories_of_a_ranking_share_every_common_message(tmp_path, model):
    """Sums equal those of whole conversations in plain PyTorch, and a run that of separate rows."""
    config = PreferenceDatasetConfig(
        dataset_name=rows_of(tmp_path, TRAJECTORIES), targets="all", rankings="whole"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    prepared = prepare_tables(config, tokenizer, tmp_path / "tables", max_length=1024)
    examples = Examples(prepared.train, trees=True)
    batch = collate(examples, np.arange(2), shared=Sharing.LINE)
    shared = len(tokenizer(LONG)["input_ids"])
    separate = examples.separate_tokens(0) + examples.separate_tokens(1)
    # Beside the prompt, the call and its result are computed once instead of three times.
    prompts = sum(len(prepared.train.ids(row, "prompt")) * n for row, n in ((0, 3), (1, 1)))
    assert batch.real_tokens < separate - prompts - 2 * shared
    scorer = make_scorer(LlamaForCausalLM.from_pretrained(model, dtype=torch.float64))
    with torch.no_grad():
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
    sums = batch.sums(output.logprobs)
    for row, expected in enumerate(sums_of_trajectories(model)):
        for slot, (total, count) in enumerate(expected):
            assert float(sums[row, slot]) == pytest.approx(total, rel=1e-6)
            assert int(batch.lengths[row, slot]) == count
    losses = []
    for attention in ("auto", "separate"):
        train = TrainingConfig(
            run_name="r", output_dir=tmp_path / attention, batch_size=2, max_steps=3, log_every=1,
            learning_rate=2e-4, attention=attention, tokens_per_micro_batch=4000,
        )  # fmt: skip
        settings = DPOConfig(loss_type="plackett_luce", beta=0.5, max_length=1024)
        run_dpo(model, train, settings, config)
        losses.append([line["loss"] for line in logged(tmp_path / attention)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    assert losses[0][-1] < losses[0][0] - 0.01


@pytest.mark.slow
def test_kto_on_whole_conversations_is_the_same_with_a_stored_and_a_live_reference(tmp_path, model):
    data = LabelledDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", PAIRS)), targets="all"
    )
    losses = []
    for reference in ("cache", "model"):
        fields = {"batch_size": 5, "max_steps": 3, "log_every": 1, "learning_rate": 1e-3}
        train = TrainingConfig(run_name="k", output_dir=tmp_path / reference, **fields)
        run_kto(model, train, KTOConfig(reference=reference, max_length=1024), data)
        losses.append([line["loss"] for line in logged(tmp_path / reference)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_sft_trains_on_every_turn(tmp_path, model):
    fields = {"batch_size": len(TALKS), "max_steps": 1, "log_every": 1}
    train = TrainingConfig(run_name="s", output_dir=tmp_path / "sft", **fields)
    data = InstructionDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "rows.jsonl", TALKS)),
        targets="all",
        max_length=1024,
    )
    run_sft(model, train, data)
    sums = [plain_sums(model, row, 0)[0] for row in TALKS]
    expected = -sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert logged(tmp_path / "sft")[0]["loss"] == pytest.approx(expected, rel=1e-5)
