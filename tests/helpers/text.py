"""Text of our own: a small tokenizer, preference pairs and a tiny checkpoint, for tests without
real input."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = (
    "the a red blue old small quick river house cat dog bird tree stone walks sings sleeps falls "
    "finds "
    "keeps under over near with without and but because every some many why how when where"
).split()


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def transcripts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """HH-RLHF style pairs of unequal lengths, some with several turns."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = "".join(
            f"\n\nHuman: {sentence(rng, 2, 12)}?\n\nAssistant: {sentence(rng, 1, 10)}."
            for _ in range(rng.randint(0, 2))
        )
        prompt += f"\n\nHuman: {sentence(rng, 1, 15)}?\n\nAssistant:"
        answers = [f" {sentence(rng, 1, 25)}." for _ in range(2)]
        rows.append({"chosen": prompt + answers[0], "rejected": prompt + answers[1]})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tokenizer(folder: Path, vocabulary: int = 300) -> Path:
    """A byte-level BPE with an end and a pad token, trained on the transcripts, as a transformers
    folder."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [row["chosen"] for row in transcripts(50, seed=9)]
    bpe.train_from_iterator(
        texts, vocabulary, special_tokens=["<|end|>", "<|pad|>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_checkpoint(folder: Path, tokenizer: Path, seed: int = 0, **shape) -> Path:
    """A tiny random Llama with that tokenizer, weights wide enough for log-probs that differ."""
    from transformers import AutoTokenizer

    from modern_llm.config import ModernLLMConfig
    from modern_llm.models.build import build_model

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    fields = {
        "vocab_size": len(loaded), "d_model": 32, "n_layers": 2, "n_heads": 4, "use_gqa": True,
        "gqa_groups": 2, "max_seq_len": 256, "initializer_range": 0.1, "tie_embeddings": False,
    }  # fmt: skip
    build_model(ModernLLMConfig(**(fields | shape)), seed=seed).save_pretrained(folder)
    loaded.save_pretrained(folder)
    return folder
