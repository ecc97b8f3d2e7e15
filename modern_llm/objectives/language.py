"""Language modelling: the loss of each target token, and perplexity from sums.

Sums over tokens and division by counts are the loop's; the callers are the pretraining and SFT
tasks and whatever reports perplexity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def language_loss(logprobs: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats (N,) of targets with log-probs (N,).

    At least float32, float64 stays. ValueError for another shape or an integer type.
    """
    if logprobs.dim() != 1 or not logprobs.is_floating_point():
        raise ValueError(
            f"language_loss takes floating log-probs of shape (N,), one for each target; got "
            f"{tuple(logprobs.shape)} of {logprobs.dtype}"
        )
    return -logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))


def perplexity(nll: float, tokens: float) -> float:
    """Return exp(nll / tokens): `nll` is a sum in nats over `tokens` targets.

    Infinite where that overflows; ValueError without tokens.
    """
    if not tokens > 0:
        raise ValueError(f"perplexity needs at least one target token; got tokens={tokens!r}")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf
