"""Language modelling: the loss of each target token, and perplexity from sums.

The loop sums over tokens and divides by counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def language_loss(logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats (N,) of targets with log-probs (N,).

    The result is at least float32. ValueError for another shape or an integer type.
    """
    if logprobs.dim() != 1 or not logprobs.is_floating_point():
        raise ValueError(
            f"language_loss takes floating log-probs of shape (N,), one per target; got "
            f"{tuple(logprobs.shape)} of {logprobs.dtype}"
        )
    return -logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))


def perplexity(nll: float, tokens: float) -> float:
    """Return exp(nll / tokens): `nll` is a sum in nats over `tokens` targets.

    Infinity on overflow; ValueError without tokens.
    """
    if not tokens > 0:
        raise ValueError(f"perplexity needs at least one target token; got tokens={tokens!r}")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
