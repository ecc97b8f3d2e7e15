"""What micro-batches cost and saved: counts that stay on the host, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from modern_llm.data.batch.collate import MicroBatch

NAMES = ("tokens", "area", "separate", "flops")


def usage_sums(batch: MicroBatch) -> dict[str, Tensor]:
    """Return () float64 counts on the host: real tokens, tokens with padding, tokens of separate
    rows, and ideal operations."""
    counts = (batch.real_tokens, batch.area, batch.separate_tokens, batch.flops)
    return {
        name: torch.tensor(float(count), dtype=torch.float64)
        for name, count in zip(NAMES, counts, strict=True)
    }


def usage_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the shares of padding, and of tokens that sharing prompts and answers saved."""
    return {
        "padding": 1 - sums["tokens"] / max(sums["area"], 1),
        "prefix_saving": 1 - sums["tokens"] / max(sums["separate"], 1),
    }
