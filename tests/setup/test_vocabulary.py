"""A tokenizer with ids beyond the embedding: fine until a row, or a prompt, holds one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    TrainingConfig,
)
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import UserError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.evaluation.score import score_pairs
from modern_llm.inference.chat import answer_prompts
from modern_llm.training.train_dpo import run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft
from tests.helpers.text import make_checkpoint, make_tokenizer, sentence, write_jsonl

IMAGE = "<|image|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """300 rows of the embedding, 302 tokens; padding is one of the two more."""
    folder = tmp_path_factory.mktemp("extra")
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(folder / "tokenizer"))
    tokenizer.add_special_tokens({"pad_token": "<|more|>", "additional_special_tokens": [IMAGE]})
    assert len(tokenizer) == 302 and tokenizer.pad_token_id >= 300
    tokenizer.save_pretrained(folder / "tokenizer")
    return make_checkpoint(folder / "model", folder / "tokenizer", vocab_size=300)


def rows(count: int, extra: str = "") -> list[dict[str, str]]:
    import random

    rng = random.Random(3)
    made = [
        {"prompt": sentence(rng, 2, 5), "chosen": f" {sentence(rng, 2, 5)}", "rejected": " no."}
        for _ in range(count)
    ]
    made[-2]["rejected"] += extra
    return made


def config(folder: Path, **more) -> TrainingConfig:
    values = {"run_name": "run", "output_dir": folder, "batch_size": 4, "max_steps": 1}
    return TrainingConfig(**values | more)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_run_is_refused_by_the_row(model, tmp_path, held_out):
    def run(name: str, extra: str) -> Path:
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows(8, extra))
        good = write_jsonl(tmp_path / "good.jsonl", rows(8))
        names = {"dataset_name": str(good if held_out else path)}
        if held_out:
            names["eval_dataset_name"] = str(path)
        return run_dpo(
            model,
            config(tmp_path / name, eval_every=1),
            DPOConfig(max_length=64),
            PreferenceDatasetConfig(**names),
        )

    if not held_out:
        final = run("fine", "")
        assert len(answer_prompts(str(final), ["the", "the red blue"], max_new_tokens=2)) == 2
    with pytest.raises(UserError, match=r"bad.jsonl:7: token id 30\d .*image.* embedding has 300"):
        run("bad", IMAGE)


def test_sft_and_pretraining_are_refused_by_the_row(model, tmp_path):
    instructions = [{"prompt": r["prompt"], "response": r["rejected"]} for r in rows(8, IMAGE)]
    path = write_jsonl(tmp_path / "sft.jsonl", instructions)
    with pytest.raises(UserError, match=r"sft.jsonl:7: token id 30\d"):
        data = InstructionDatasetConfig(dataset_name=str(path))
        run_sft(model, config(tmp_path / "sft"), data)
    documents = [{"text": r["prompt"] + r["rejected"]} for r in rows(40, IMAGE)]
    path = write_jsonl(tmp_path / "documents.jsonl", documents)
    shape = ModernLLMConfig(
        vocab_size=300, d_model=16, n_layers=1, n_heads=2, ffn_hidden_size=32, max_seq_len=8
    )
    with pytest.raises(UserError, match=r"documents.jsonl:3\d: token id 30\d"):
        run_training(
            shape,
            config(tmp_path / "lm", tokenizer_name=str(model)),
            dataset_config=DocumentDatasetConfig(dataset_name=str(path)),
        )


def test_scores_and_answers_are_refused_by_the_row(model, tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", rows(4))
    bad = write_jsonl(tmp_path / "bad.jsonl", rows(4, IMAGE))
    out = tmp_path / "out.jsonl"
    score_pairs(str(model), PreferenceDatasetConfig(dataset_name=str(good)), out, max_length=64)
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 4
    with pytest.raises(UserError, match=r"bad.jsonl:3: token id 30\d"):
        score_pairs(str(model), PreferenceDatasetConfig(dataset_name=str(bad)), out, max_length=64)
    # Prompts of two lengths: the shorter is padded, though the padding token has no embedding.
    assert len(answer_prompts(str(model), ["the", "the red blue old"], max_new_tokens=2)) == 2
    with pytest.raises(UserError, match=r"prompt 2: token id 30\d .*image"):
        answer_prompts(str(model), ["the", f"the {IMAGE}"], max_new_tokens=2)
