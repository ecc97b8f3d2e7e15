"""The inputs that every trainer gets: a tiny model, tokenizers, templates and rows.

All are made from seeds, so every machine has the same. The model is a Llama with random weights
wide enough that log-probs differ from row to row.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = (
    "the a red blue old small quick river house cat dog bird tree stone walks sings sleeps falls "
    "finds keeps under over near with without and but because every some many why how when where"
).split()
MARKS = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|/head|>", "<|eot|>",
    "<turn>", "</turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "[INST]", "[/INST]",
    "<think>", "</think>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
END = "</s>"
_TURNS = "{% for m in messages %}"
TEMPLATES = {
    # name: (template, the token that ends a response)
    "chatml": (
        _TURNS + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "llama-2": (
        _TURNS + "{% if m.role == 'user' %}<s>[INST] {{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "llama-3": (
        "<|bos|>" + _TURNS + "<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>"
        "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
        "<|eot|>",
    ),
    "gemma": (
        "<|bos|>" + _TURNS + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "<turn>{{ role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>model\n{% endif %}",
        "</turn>",
    ),
    "phi-3": (
        _TURNS + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
    "zephyr": (
        _TURNS + "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
    ),
    "an empty thought in the last turn only": (
        _TURNS + "<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "a generation prompt that opens a thought": (
        "<|bos|>" + _TURNS + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "</s>",
    ),
}


def sentence(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def pairs(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, str]]:
    """Return preference pairs of strings with unequal lengths; no two are the same."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        prompt = f"Question {number}: {sentence(rng, 2, longest)}?\nAnswer:"
        chosen, rejected = (f" {sentence(rng, 1, longest)}." for _ in range(2))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": f"{rejected} no"})
    return rows


def answers(count: int, seed: int = 0, longest: int = 20) -> list[dict[str, str]]:
    """Return rows of one prompt and one response."""
    return [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs(count, seed, longest)]


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return preference pairs of messages; the prompt has three turns."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        turns = [("user", 8), ("assistant", 8), ("user", 12)]
        prompt = [{"role": role, "content": sentence(rng, 1, high)} for role, high in turns]
        chosen, rejected = (
            [{"role": "assistant", "content": sentence(rng, 2, 12) + word}] for word in (".", "?")
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer(template: str = "chatml", vocabulary: int = 400) -> Any:
    """Return a byte-level BPE tokenizer; another vocabulary merges other pieces."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    texts = [row["prompt"] + row["chosen"] for row in pairs(60, seed=9)]
    special = list(MARKS) + ["<|pad|>"]
    core.train_from_iterator(texts, vocabulary, special_tokens=special, show_progress=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core._tokenizer, eos_token=END, pad_token="<|pad|>"
    )
    made.chat_template = TEMPLATES[template][0]
    return made


def model(
    folder: Path, seed: int = 0, template: str = "chatml", vocabulary: int = 400, rows: int = 448
) -> Path:
    """Write a random Llama of about 0.2M parameters with a tokenizer.

    Args:
        rows: of the embedding, so that models of different tokenizers have the same shape.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(template, vocabulary)
    shape = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=made.pad_token_id,
        eos_token_id=made.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(shape).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def log_probs(folder: Path, tokens: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the log-prob sums of both responses by a plain forward in float64, one row at a time.

    Args:
        tokens: `prompt_ids`, `chosen_ids` and `rejected_ids` of each pair.
    """
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for row in tokens:
        sums = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                scores = plain(ids).logits[0, :-1].log_softmax(-1)
            taken = scores.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(taken[len(row["prompt_ids"]) - 1 :].sum()))
        found.append((sums[0], sums[1]))
    return found
