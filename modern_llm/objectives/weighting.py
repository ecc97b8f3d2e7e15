"""Changes to any preference loss: other f-divergences, and the weights of WPO.

Letters as in `preference`: P pairs; r is the log-ratio policy - reference (P, 2), t = exp(r).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from modern_llm.objectives.catalogue import F_ALPHA

MAX_EXPONENT = 80.0
"""Largest exponent: exp(80) and its products with usual betas are finite in float32."""


def divergence_scores(r: Tensor, f_divergence: str, f_alpha: float | None = None) -> Tensor:
    """Return f'(t) (P, 2), which takes the place of log t = r, f-DPO, arXiv 2309.16240, eq. 11.

    An exponent is clamped at `MAX_EXPONENT`, with gradient 0 beyond.

    Args:
        f_divergence: reverse_kl, forward_kl, js_divergence or alpha_divergence.
        f_alpha: alpha of the latter; None is 0.5. At 1 it is the reverse KL, at 0 the forward one.
    """
    if f_divergence == "forward_kl":
        return 1 - torch.exp((-r).clamp(max=MAX_EXPONENT))  # 1 - 1/t
    if f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(r)  # log(2t / (1 + t))
    power = (F_ALPHA if f_alpha is None else f_alpha) - 1
    if f_divergence == "reverse_kl" or abs(power) < 1e-6:
        return r
    # (t^(alpha - 1) - 1) / (alpha - 1); expm1 keeps the digits of small exponents.
    return torch.expm1((power * r).clamp(max=MAX_EXPONENT)) / power


def agreement_weights(agreement: Tensor, lengths: Tensor) -> Tensor:
    """Return WPO's weight of each pair (P,), detached, arXiv 2406.11827, eq. 2.

    exp(mean_w) * exp(mean_l), where mean is over the tokens of an answer: likely answers of the
    policy weigh more, as if they had been sampled from it.

    Args:
        agreement: (P, 2) sums over target tokens of log p(target) - log sum_v p(v)^2.
        lengths: (P, 2) numbers of target tokens.
    """
    means = agreement.detach() / lengths.to(agreement.dtype).clamp(min=1)
    return means.sum(1).exp()
