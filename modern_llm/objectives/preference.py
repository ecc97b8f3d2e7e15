"""The loss and the statistics of preference pairs, from their log-probs.

`preference_loss` checks the arguments and adds up the losses of a list; `losses` computes each,
`catalogue` lists inputs and options. Losses are per pair and statistics are sums, because the loop
divides.

Letters: P pairs; `policy`, `reference` and `lengths` are (P, 2), column 0 = chosen, column 1 =
rejected; log-probs are sums over the target tokens in nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modern_llm.objectives import catalogue
from modern_llm.objectives.losses import FUNCTIONS, worse_than
from modern_llm.objectives.weighting import divergence_scores


def preference_loss(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    nll_coefficient: float = 0.0,
    **settings: Any,
) -> Tensor:
    """Return the loss of each pair (P,), in the widest input type and at least float32.

    Of a list of losses it is their sum, weighted by `loss_weights` (MPO, arXiv 2411.10442). The
    other arguments and errors are those of `preference_terms`.
    """
    terms = preference_terms(
        policy,
        reference,
        lengths,
        loss_type=loss_type,
        loss_weights=loss_weights,
        nll_coefficient=nll_coefficient,
        **settings,
    )
    return total_of(terms, catalogue.coefficients_of(loss_type, loss_weights, nll_coefficient))


def total_of(terms: Mapping[str, Tensor], coefficients: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the terms."""
    parts = [
        term if coefficients[name] == 1 else coefficients[name] * term
        for name, term in terms.items()
    ]
    return sum(parts[1:], parts[0])


def preference_terms(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float | None = None,
    nll_coefficient: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float | None = None,
    mean_length: float | None = None,
    margins: Tensor | None = None,
    levels: Tensor | None = None,
    **options: float | None,
) -> dict[str, Tensor]:
    """Return each loss by its name, and the term `nll`, (P,) each, without their coefficients.

    `policy`, `reference`: (P, 2) sums of log-probs, column 0 = chosen; `lengths`: (P, 2) numbers of
    target tokens, each >= 1 (not checked: that would wait for the device). `reference` may be None
    for losses without one; `lengths` may be None if neither the loss nor `nll_coefficient` needs
    them. The reference gets no gradient. P = 0 gives shape (0,).

    An option that is None has the default of the loss. `nll_coefficient` weighs an added term, the
    chosen answer's NLL per token (Pang et al. 2024, arXiv 2404.19733). For `aot` and `aot_unpaired`
    pass all pairs of the step; row i is then the term with pair i's policy ratio. `mean_length`:
    mean number of the step's chosen target tokens for `sft`, by default of the given pairs.
    `margins` (P,): subtracted inside the link (DPO with an offset, arXiv 2402.10571, eq. 3).
    A loss of rankings takes (P, K) inputs, best first, and `levels` where some tie or are absent.

    ValueError: wrong shape, type or device; unknown loss; option not taken or out of bounds.
    """
    given = {**options, "label_smoothing": label_smoothing, "f_alpha": f_alpha}
    given["nll_coefficient"] = nll_coefficient
    if problems := catalogue.check_options(
        loss_type, given, beta=beta, loss_weights=loss_weights, f_divergence=f_divergence
    ):
        raise ValueError("; ".join(problems))
    rows = catalogue.rows_of(loss_type)
    policy, reference, lengths = _checked(
        policy, reference, lengths, rows, lengths_needed=nll_coefficient > 0
    )
    scores = None
    if f_divergence != "reverse_kl" and reference is not None:
        scores = divergence_scores(policy - reference, f_divergence, f_alpha)
    terms = {}
    for row in rows:
        values = catalogue.resolve_options(row.name, given)
        values.pop("nll_coefficient")
        inputs = [policy, reference] if row.reference else [policy]
        if row.reference and scores is not None:
            inputs = [scores, torch.zeros_like(scores)]
        if row.margin and margins is not None:
            inputs[0] = _with_margins(inputs[0], margins / beta, lengths if row.lengths else None)
        inputs += _more_inputs(row, policy, lengths, mean_length, levels)
        terms[row.name] = _per_pair(row, FUNCTIONS[row.name](*inputs, beta=beta, **values), policy)
    if nll_coefficient > 0:
        terms[catalogue.NLL] = -policy[:, 0] / lengths[:, 0]
    return terms


def _more_inputs(
    row: catalogue.LossRow,
    policy: Tensor,
    lengths: Tensor | None,
    mean_length: float | None,
    levels: Tensor | None,
) -> list[Tensor]:
    """Return what a loss takes besides log-probs."""
    if row.ranking:
        return [_levels(policy, levels)]
    if row.lengths:
        return [_mean_length(lengths, mean_length) if row.mean_lengths else lengths]
    return []


def _levels(policy: Tensor, levels: Tensor | None) -> Tensor:
    """Return the levels (P, K), by default those of K responses from the best to the worst."""
    if levels is None:
        return torch.arange(policy.shape[1], device=policy.device).expand_as(policy)
    if levels.shape != policy.shape:
        raise ValueError(
            f"levels must have the shape of policy, {tuple(policy.shape)}; got "
            f"{tuple(levels.shape)}"
        )
    return levels


def _per_pair(row: catalogue.LossRow, losses: Tensor, policy: Tensor) -> Tensor:
    """Return the losses, which a user's function may have averaged or misshapen."""
    if row.own and losses.shape != policy.shape[:1]:
        raise ValueError(
            f"loss_type={row.name!r} returned the shape {tuple(losses.shape)}: return one loss a "
            f"pair, {tuple(policy.shape[:1])}"
        )
    return losses


def _with_margins(policy: Tensor, margins: Tensor, lengths: Tensor | None) -> Tensor:
    """Return (P, 2) with the rejected side raised by (P,) margins, in units of the log-ratio; times
    the length for a loss that divides by it. The chosen side stays: dpop looks at it alone."""
    raised = margins.to(policy.dtype) * (1 if lengths is None else lengths[:, 1])
    return torch.stack((policy[:, 0], policy[:, 1] + raised), 1)


def _mean_length(lengths: Tensor, mean_length: float | None) -> Tensor:
    """Return (P, 2) the mean length of chosen answers, of the given pairs if it is None."""
    if mean_length is None:
        return lengths[:, :1].mean().expand_as(lengths)
    return torch.full_like(lengths, mean_length)


def preference_statistics(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None = None,
    *,
    beta: float,
    loss_type: str | Sequence[str] = "sigmoid",
    weights: Tensor | None = None,
    levels: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return detached sums over the P pairs (0-dim tensors): rewards, accuracies, ties, log-probs.

    A reward is beta * (policy - reference) in nats for every loss with a reference, also the
    length-normalised ones and any f-divergence, as other trainers log it. Losses without a
    reference need `lengths`:
    their reward is that of SimPO, beta * policy / lengths (arXiv 2405.14734, eq. 4). An accuracy
    is a strict chosen > rejected; equal rewards count as `ties`. `logps/*` are sums over tokens for
    every loss. A pair of weight w counts as w pairs. Shapes, types and errors as in
    `preference_loss`.
    """
    if problems := catalogue.check_options(loss_type, {}, beta=beta):
        raise ValueError("; ".join(problems))
    rows = catalogue.rows_of(loss_type)
    with_reference = any(row.reference for row in rows)
    policy, reference, lengths = _checked(
        policy.detach(), reference, lengths, rows, lengths_needed=not with_reference, losses=False
    )
    rewards = beta * (policy - reference if with_reference else policy / lengths)
    if rows[0].ranking:
        return _ranking_statistics(rewards, policy, _levels(policy, levels), weights)
    chosen, rejected = rewards.unbind(1)
    found = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(rewards.dtype),
        "ties": (chosen == rejected).to(rewards.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    return {name: weighted_sum(values, weights) for name, values in found.items()}


def _ranking_statistics(
    rewards: Tensor, policy: Tensor, levels: Tensor, weights: Tensor | None
) -> dict[str, Tensor]:
    """Return the same sums for rankings (P, K), and `rewards/kendall`.

    Chosen is the best response and rejected the worst, the first and the last one of the row. An
    accuracy (top-1) is a best response whose reward is above that of every worse one. Kendall's tau
    is (right - wrong) / all of a ranking's pairs of a better and a worse response; `ties` is the
    share of these with equal rewards.
    """
    compared = worse_than(levels)
    difference = rewards[:, :, None] - rewards[:, None, :]
    count = compared.sum((1, 2)).clamp(min=1)
    last = (levels >= 0).sum(1, keepdim=True) - 1
    worst, worst_policy = (x.gather(1, last)[:, 0] for x in (rewards, policy))
    first = (difference > 0)[:, 0] | ~compared[:, 0]
    found = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": worst,
        "rewards/accuracies": first.all(1).to(rewards.dtype),
        "rewards/kendall": (difference.sign() * compared).sum((1, 2)) / count,
        "ties": ((difference == 0) & compared).sum((1, 2)) / count,
        "rewards/margins": rewards[:, 0] - worst,
        "logps/chosen": policy[:, 0],
        "logps/rejected": worst_policy,
    }
    return {name: weighted_sum(values, weights) for name, values in found.items()}


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Return the sum () of values (P,), each times its weight."""
    return values.sum() if weights is None else (values * weights.to(values.dtype)).sum()


def _checked(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None,
    rows: Sequence[catalogue.LossRow],
    *,
    lengths_needed: bool,
    losses: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the three inputs in one floating type; ValueError if one is missing or misshapen.

    `losses`: whether the losses are computed, some of which need the lengths.
    """
    ranking = any(row.ranking for row in rows)
    if policy.dim() != 2 or (policy.shape[1] != 2 and not ranking) or policy.shape[1] < 2:
        raise ValueError(
            f"policy must have shape (P, 2), column 0 = chosen; got {tuple(policy.shape)}"
        )
    readers = [row.name for row in rows if row.reference]
    dividers = [row.name for row in rows if (losses and row.lengths) or lengths_needed]
    if readers and reference is None:
        raise ValueError(
            f"loss_type={readers[0]!r} needs the reference's log-probs, but reference is None: "
            f"score the reference, or choose a loss without one"
        )
    if dividers and lengths is None:
        raise ValueError(
            f"loss_type={dividers[0]!r} with these settings divides by token counts, but lengths "
            f"is None: pass the number of target tokens of each answer, shape (P, 2)"
        )
    for name, tensor in (("reference", reference), ("lengths", lengths)):
        if tensor is not None and tensor.shape != policy.shape:
            raise ValueError(
                f"{name} must have the shape of policy, {tuple(policy.shape)}; "
                f"got {tuple(tensor.shape)}"
            )
        if tensor is not None and tensor.device != policy.device:
            raise ValueError(
                f"{name} is on {tensor.device} and policy on {policy.device}: move them together"
            )
    for name, tensor in (("policy", policy), ("reference", reference)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must hold log-probs in a floating type; got {tensor.dtype}")
    # A difference of two sums of hundreds of nats has no correct digit in bfloat16.
    dtype = torch.promote_types(policy.dtype, torch.float32)
    if not readers:
        reference = None
    if reference is not None:
        dtype = torch.promote_types(dtype, reference.dtype)
        reference = reference.detach().to(dtype)
    if lengths is not None:
        lengths = lengths.detach().to(dtype)
    return policy.to(dtype), reference, lengths
