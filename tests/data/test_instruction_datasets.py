"""Encoding of instructions, on our own text and on real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modern_llm.config.errors import UserError
from modern_llm.data.instruction_datasets import InstructionDatasetConfig
from modern_llm.data.read.formats import ALPACA_FRAME, ALPACA_FRAME_WITH_INPUT
from modern_llm.data.table.build import prepare_tables

ROWS = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Name a {colour}.", "input": "", "output": "Blue, or green."},
]


def words(path: Path, tokenizer, **options) -> list[list[str]]:
    lengths = options.pop("lengths", {})
    config = InstructionDatasetConfig(dataset_name=str(path), **options)
    table = prepare_tables(config, tokenizer, path.parent / "tables", **lengths).train
    assert table.columns == ("prompt", "response")
    return [[tokenizer.decode(table.ids(i, c)) for c in table.columns] for i in range(len(table))]


def test_alpaca_fields_get_their_frame_without_a_template(jsonl, make_tokenizer):
    tokenizer = make_tokenizer(chat="{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    path = jsonl(ROWS)
    assert words(path, tokenizer) == [
        [ALPACA_FRAME_WITH_INPUT.format(instruction="Add.", input="1 and 2"), "3<|end|>"],
        [ALPACA_FRAME.replace("{instruction}", "Name a {colour}."), "Blue, or green.<|end|>"],
    ]
    assert [prompt for prompt, _ in words(path, tokenizer, template="Q {prompt}")] == [
        "Q Add.\n\n1 and 2",
        "Q Name a {colour}.",
    ]
    assert [prompt for prompt, _ in words(path, tokenizer, template="chat")] == [
        "<|user|>Add.\n\n1 and 2",
        "<|user|>Name a {colour}.",
    ]


def test_message_lists_end_with_the_last_answer(jsonl, tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    rows = [row, {"messages": row["messages"][:2]}]
    assert words(jsonl(rows), tokenizer, template=template) == [
        ["[a][b][c]", "[d]<|end|>"],
        ["[a]", "[b]<|end|>"],
    ]


def test_lengths_come_from_the_call_or_else_from_the_section(jsonl, tokenizer):
    path = jsonl([{"prompt": "0123456789", "response": "abcdef"}])
    assert words(path, tokenizer) == [["0123456789", "abcdef<|end|>"]]
    assert words(path, tokenizer, max_length=8) == [["6789", "abcd"]]
    said = {"max_length": 10, "max_prompt_length": 2}
    assert words(path, tokenizer, **said) == [["789", "abcdef<|end|>"]]
    assert words(path, tokenizer, max_length=8, lengths=said) == [["789", "abcdef<|end|>"]]
    none = {"max_length": 8, "max_prompt_length": 0}
    assert words(path, tokenizer, lengths=none) == [["9", "abcdef<|end|>"]]
    with pytest.raises(UserError, match="max_prompt_length 8 .*max_length 8"):
        words(path, tokenizer, max_length=9, max_prompt_length=8, lengths={"max_length": 8})


def test_alpaca_sample(shared: Path, tmp_path: Path):
    source = shared / "data" / "alpaca_sample.json"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    config = InstructionDatasetConfig(dataset_name=str(source), max_length=4096)
    prepared = prepare_tables(config, tokenizer, tmp_path / "t")
    rows = json.loads(source.read_text(encoding="utf-8"))
    assert prepared.report.kept == len(rows) == 600 and prepared.report.formats == {"alpaca": 600}
    for i, row in enumerate(rows):
        prompt, answer = (
            tokenizer.decode(prepared.train.ids(i, c)) for c in ("prompt", "response")
        )
        assert answer == row["output"] + "<|endoftext|>"
        assert prompt.endswith("\n\n### Response:\n") and row["instruction"] in prompt
        assert ("### Input:" in prompt) == bool(row["input"])
