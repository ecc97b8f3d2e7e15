"""Rows that the probe measures, and the log-probs of a model's own plain forward over them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.models.routers import without_router_loss


def random_pairs(model: PreTrainedModel, sizes: tuple[tuple[int, ...], ...]) -> list[list[Tensor]]:
    """Return two trees [prompt, chosen, rejected] of unequal lengths, of random ids."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    rows = model.get_input_embeddings().weight.shape[0]
    rows = min(rows, getattr(config, "vocab_size", None) or rows, 1000)
    special = {getattr(config, "pad_token_id", None)}
    usable = torch.tensor([i for i in range(rows) if i not in special])

    def draw(length: int) -> Tensor:
        return usable[torch.randint(len(usable), (length,), generator=generator)]

    return [[draw(n) for n in lengths] for lengths in sizes]


def plain_all(model: PreTrainedModel, pairs: list[list[Tensor]]) -> Tensor:
    """Return the log-probs of all answers, concatenated."""
    parts = [plain(model, prompt, answer) for prompt, *answers in pairs for answer in answers]
    return torch.cat(parts)


def plain(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Return the log-probs of `answer` after `prompt`, by the model's own forward, unpadded."""
    ids = torch.cat([prompt, answer]).to(model.device)[None]
    logits = model(input_ids=ids, use_cache=False, **without_router_loss(model)).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    states = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return states.gather(-1, answer.to(model.device)[:, None]).squeeze(-1)


def rows(pairs: list[list[Tensor]], device: torch.device, trees: bool) -> tuple[Tensor, ...]:
    """Return the scorer's ids, positions, segments and targets: all trees in one row, or one padded
    sequence per row."""
    sequences = (
        [[(p, 0, 0), (a, 1, len(p)), (b, 2, len(p))] for p, a, b in pairs]
        if trees
        else [[(p, 0, 0), (x, 0, len(p))] for p, a, b in pairs for x in (a, b)]
    )
    length = sum(len(t) for s in sequences for t, _, _ in s) + 2
    if not trees:
        length = max(sum(len(t) for t, _, _ in s) for s in sequences) + 1
    count = 1 if trees else len(sequences)
    ids = torch.zeros(count, length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full((count, length, 2), -1)
    targets: list[tuple[int, int]] = []
    at = 0
    for index, sequence in enumerate(sequences):
        row, at = (0, at) if trees else (index, 0)
        prefix_end = at + len(sequence[0][0]) - 1
        for part, (tokens, branch, start) in enumerate(sequence):
            here = slice(at, at + len(tokens))
            ids[row, here] = tokens
            positions[row, here] = torch.arange(start, start + len(tokens))
            segments[row, here] = torch.tensor([index, branch])
            if part:
                states = [prefix_end, *range(at, at + len(tokens) - 1)]
                targets += [(row * length + s, int(t)) for s, t in zip(states, tokens, strict=True)]
            at += len(tokens)
    packed = (ids, positions, segments, torch.tensor(targets).t())
    return tuple(tensor.to(device) for tensor in packed)
