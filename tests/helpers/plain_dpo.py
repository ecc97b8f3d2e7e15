"""Pairs and log-prob sums of plain PyTorch loops, which runs are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

Pair = tuple[list[int], list[int], list[int]]
"""Token ids of prompt, chosen and rejected response."""


def encoded(checkpoint: Path, data: Path, max_length: int) -> list[Pair]:
    """Return the pairs of HH transcripts, cut to `max_length`; unlike prompts are left out."""
    tokenizer, pairs = AutoTokenizer.from_pretrained(checkpoint), []
    for line in data.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        (p, c), (q, r) = (row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected"))
        if p == q and c.strip() and r.strip():
            p, c, r = (tokenizer(t)["input_ids"] for t in (p + "\n\nAssistant:", c, r))
            c, r = c + [tokenizer.eos_token_id], r + [tokenizer.eos_token_id]
            room = max(max_length // 2, max_length - max(len(c), len(r)))
            p = p[-room:]
            pairs.append((p, c[: max_length - len(p)], r[: max_length - len(p)]))
    return pairs


def sums(model: torch.nn.Module, batch: list[Pair]) -> torch.Tensor:
    """Return the log-prob sums (P, 2) of padded rows, one a response."""
    rows = [(p, a) for p, c, r in batch for a in (c, r)]
    width = max(len(p) + len(a) for p, a in rows)
    ids, mask, target = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (p, a) in enumerate(rows):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        mask[i, : len(p) + len(a)] = 1
        target[i, len(p) : len(p) + len(a)] = 1
    logprobs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (chosen * target[:, 1:]).sum(-1).view(-1, 2)
