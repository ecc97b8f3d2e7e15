"""Small tokenizers trained on our own text, and helpers that write files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "\n\nHuman: How far is the moon?\n\nAssistant: About 384,400 kilometres, on average.",
    "\n\nHuman: Thank you. And the sun?\n\nAssistant: About 150 million kilometres.",
    "The harbour was quiet in the morning. Boats came in one after another.",
    "To bake bread, mix flour, water, salt and yeast; wait; then bake it for forty minutes.",
]
SPECIAL = ["<|end|>", "<|begin|>", "<|done|>", "<|user|>", "<|assistant|>", "<|system|>"]

TokenizerFactory = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerFactory:
    """Byte-level BPE; `begin` adds a token before texts, `chat` is its chat template."""

    def make(
        *, begin: bool = False, chat: str | None = None, end: bool = True, size: int = 400
    ) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        core.train_from_iterator(CORPUS, trainer)
        if begin:
            token = ("<|begin|>", core.token_to_id("<|begin|>"))
            core.post_processor = processors.TemplateProcessing(
                single="<|begin|> $A", special_tokens=[token]
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            eos_token="<|end|>" if end else None,
            bos_token="<|begin|>" if begin else None,
        )
        tokenizer.chat_template = chat
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: TokenizerFactory) -> PreTrainedTokenizerFast:
    """The plain one: an end token, no leading token, no chat template."""
    return make_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or lines as they are) to a file and return its path."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write


@pytest.fixture
def pairs() -> Callable[[int], list[dict[str, str]]]:
    """Return `count` different good pairs of unequal lengths."""

    def make(count: int) -> list[dict[str, str]]:
        return [
            {
                "prompt": f"How far is boat {i}?" + " And then?" * (i % 3),
                "chosen": f" It is {i} kilometres away." * (1 + i % 4),
                "rejected": f" Wait {i} minutes." * (1 + i % 2),
            }
            for i in range(count)
        ]

    return make
