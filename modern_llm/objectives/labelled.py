"""Losses and statistics of single responses that are labelled desirable or undesirable.

Losses are per example and statistics are sums, because the loop divides.

Letters: P examples; `policy` and `reference` are (P,) sums of log-probs over the target tokens in
nats; `desirable` is (P,) bool; r is the log-ratio policy - reference, s the logistic function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modern_llm.objectives.labelled_catalogue import LABELLED_LOSSES

FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
"""Name in the catalogue -> function; filled by `loss`."""


def loss(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate the function of the catalogue's loss `name`."""

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FUNCTIONS[name] = function
        return function

    return noted


@loss("kto")
def kto_loss(r: Tensor, signs: Tensor, kl: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta (r - kl)) where desirable, 1 - s(beta (kl - r)) where not: KTO, eqs. 7 and 8.

    arXiv 2402.01306. `signs` (P,) is 1 where desirable, else -1.
    """
    return torch.sigmoid(-signs * beta * (r - kl))


@loss("apo_zero_unpaired")
def apo_zero_unpaired_loss(r: Tensor, signs: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta r) where desirable, s(beta r) where not: APO-zero, arXiv 2408.06266, eq. 7."""
    return torch.sigmoid(-signs * beta * r)


def labelled_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor | None = None,
    *,
    loss_type: str = "kto",
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return the loss of each example (P,), times the weight of its label, at least float32.

    Args:
        kl: () the estimate of the KL divergence, as `kl_estimate` gives it, for a loss that reads
            one. It gets no gradient, as the reference.

    Raises:
        ValueError: wrong shape or type, unknown loss, or `kl` is missing.
    """
    if loss_type not in LABELLED_LOSSES:
        raise ValueError(
            f"loss_type={loss_type!r} is not a known loss: choose from {', '.join(LABELLED_LOSSES)}"
        )
    r, signs = _checked(policy, reference, desirable)
    inputs = [r, signs]
    if LABELLED_LOSSES[loss_type].kl:
        if kl is None:
            raise ValueError(
                f"loss_type={loss_type!r} compares rewards with the KL divergence, but kl is None: "
                "pass kl_estimate of responses to other prompts"
            )
        inputs.append(kl.detach().to(r.dtype))
    losses = FUNCTIONS[loss_type](*inputs, beta=beta)
    weights = torch.where(signs > 0, desirable_weight, undesirable_weight)
    return losses * weights.to(losses.dtype)


def kl_estimate(total: Tensor, count: Tensor) -> Tensor:
    """Return the KL divergence of policy and reference in nats (), at least 0, without gradient.

    A mean of log-ratios can be negative, a divergence cannot (arXiv 2402.01306, section 4.1).

    Args:
        total: () sum of the log-ratios of responses to other prompts, over the whole step.
        count: () number of them.
    """
    return (total.detach() / count.clamp(min=1)).clamp(min=0)


def labelled_statistics(
    policy: Tensor, reference: Tensor, desirable: Tensor, *, beta: float
) -> dict[str, Tensor]:
    """Return detached sums () over the examples of each label: rewards, log-probs and counts.

    A reward is beta * (policy - reference). `chosen` are the desirable ones, as other trainers name
    them.
    """
    r, signs = _checked(policy.detach(), reference, desirable)
    found = {}
    for name, mine in (("chosen", signs > 0), ("rejected", signs < 0)):
        mask = mine.to(r.dtype)
        found[f"rewards/{name}"] = beta * (r * mask).sum()
        found[f"logps/{name}"] = (policy.detach().to(r.dtype) * mask).sum()
        found[f"count/{name}"] = mask.sum()
    return found


def _checked(policy: Tensor, reference: Tensor, desirable: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-ratios (P,) and the signs (P,) of the labels in one floating type."""
    if policy.dim() != 1 or not policy.is_floating_point():
        raise ValueError(
            f"policy must be floating log-probs of shape (P,); got {tuple(policy.shape)} of "
            f"{policy.dtype}"
        )
    for name, tensor in (("reference", reference), ("desirable", desirable)):
        if tensor.shape != policy.shape:
            raise ValueError(
                f"{name} must have the shape of policy, {tuple(policy.shape)}; got "
                f"{tuple(tensor.shape)}"
            )
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable must be bool; got {desirable.dtype}")
    dtype = torch.promote_types(torch.promote_types(policy.dtype, reference.dtype), torch.float32)
    r = policy.to(dtype) - reference.detach().to(dtype)
    return r, torch.where(desirable, 1.0, -1.0).to(dtype)
