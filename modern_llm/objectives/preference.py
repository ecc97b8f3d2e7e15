"""The preference losses and their statistics, as functions of log-probs.

`preference_loss` checks the arguments and calls the function of one loss; `catalogue` lists inputs
and options of each. Losses are per pair and statistics are sums, because the loop divides.

Letters: P pairs; `policy`, `reference` and `lengths` are (P, 2), column 0 = chosen (w in papers),
column 1 = rejected (l); log-probs are sums over the target tokens in nats; `r` is the log-ratio
policy - reference (P, 2); delta = r_w - r_l (P,); s is the logistic function, e label_smoothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from modern_llm.objectives import catalogue

_FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
"""Name in the catalogue -> function; filled by `loss`."""


def loss(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate the function of the catalogue's loss `name`."""

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _FUNCTIONS[name] = function
        return function

    return noted


def preference_loss(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None,
    *,
    loss_type: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float | None = None,
    nll_coefficient: float = 0.0,
    **options: float | None,
) -> Tensor:
    """Return the loss of each pair (P,), in the widest input type and at least float32.

    `policy`, `reference`: (P, 2) sums of log-probs, column 0 = chosen; `lengths`: (P, 2) numbers of
    target tokens, each >= 1 (not checked: that would wait for the device). `reference` may be None
    for losses without one; `lengths` may be None if neither the loss nor `nll_coefficient` needs
    them. The reference gets no gradient. P = 0 gives shape (0,).

    An option that is None has the default of the loss. `nll_coefficient` weighs an added term, the
    chosen answer's NLL per token (Pang et al. 2024, arXiv 2404.19733). For `aot` and `aot_unpaired`
    pass all pairs of the optimizer step; row i is then the term with pair i's policy ratio.

    ValueError: wrong shape, type or device; unknown loss; option not taken or out of bounds.
    """
    given = {**options, "label_smoothing": label_smoothing, "nll_coefficient": nll_coefficient}
    if problems := catalogue.check_options(loss_type, given, beta=beta):
        raise ValueError("; ".join(problems))
    row = catalogue.LOSSES[loss_type]
    values = catalogue.resolve_options(loss_type, given)
    nll_coefficient = values.pop("nll_coefficient")
    policy, reference, lengths = _checked(
        policy, reference, lengths, row, lengths_needed=row.lengths or nll_coefficient > 0
    )
    inputs = [policy]
    if row.reference:
        inputs.append(reference)
    if row.lengths:
        inputs.append(lengths)
    losses = _FUNCTIONS[loss_type](*inputs, beta=beta, **values)
    if nll_coefficient > 0:
        losses = losses - nll_coefficient * policy[:, 0] / lengths[:, 0]
    return losses


def preference_statistics(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None = None,
    *,
    beta: float,
    loss_type: str = "sigmoid",
) -> dict[str, Tensor]:
    """Return detached sums over the P pairs (0-dim tensors): rewards, accuracies, ties, log-probs.

    A reward is beta * (policy - reference) in nats for every loss with a reference, also the
    length-normalised ones, as other trainers log it. Losses without a reference need `lengths`:
    their reward is that of SimPO, beta * policy / lengths (arXiv 2405.14734, eq. 4). An accuracy
    is a strict chosen > rejected; equal rewards count as `ties`. `logps/*` are sums over tokens for
    every loss. Shapes, types and errors as in `preference_loss`.
    """
    if problems := catalogue.check_options(loss_type, {}, beta=beta):
        raise ValueError("; ".join(problems))
    row = catalogue.LOSSES[loss_type]
    policy, reference, lengths = _checked(
        policy.detach(), reference, lengths, row, lengths_needed=not row.reference
    )
    rewards = beta * (policy - reference if row.reference else policy / lengths)
    chosen, rejected = rewards.unbind(1)
    return {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/accuracies": (chosen > rejected).sum().to(rewards.dtype),
        "ties": (chosen == rejected).sum().to(rewards.dtype),
        "rewards/margins": (chosen - rejected).sum(),
        "logps/chosen": policy[:, 0].sum(),
        "logps/rejected": policy[:, 1].sum(),
    }


def _checked(
    policy: Tensor,
    reference: Tensor | None,
    lengths: Tensor | None,
    row: catalogue.LossRow,
    *,
    lengths_needed: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the three inputs in one floating type; ValueError if one is missing or misshapen."""
    if policy.dim() != 2 or policy.shape[1] != 2:
        raise ValueError(
            f"policy must have shape (P, 2), column 0 = chosen; got {tuple(policy.shape)}"
        )
    if row.reference and reference is None:
        raise ValueError(
            f"loss_type={row.name!r} needs the reference's log-probs, but reference is None: "
            f"score the reference, or choose a loss without one"
        )
    if lengths_needed and lengths is None:
        raise ValueError(
            f"loss_type={row.name!r} with these settings divides by token counts, but lengths is "
            f"None: pass the number of target tokens of each answer, shape (P, 2)"
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
    if not row.reference:
        reference = None
    if reference is not None:
        dtype = torch.promote_types(dtype, reference.dtype)
        reference = reference.detach().to(dtype)
    if lengths is not None:
        lengths = lengths.detach().to(dtype)
    return policy.to(dtype), reference, lengths


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x): the cross-entropy of a label flipped with probability e."""
    if label_smoothing == 0:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _delta(policy: Tensor, reference: Tensor) -> Tensor:
    r = policy - reference
    return r[:, 0] - r[:, 1]


@loss("sigmoid")
def sigmoid_loss(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """-log s(beta delta), DPO, arXiv 2305.18290, eq. 7 (smoothed: cDPO, Mitchell 2023)."""
    return _smoothed(beta * _delta(policy, reference), label_smoothing)


@loss("robust")
def robust_loss(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """((1-e) L(delta) - e L(-delta)) / (1 - 2e) with L = -log s(beta .), arXiv 2403.00409.

    Unbiased: its mean over labels flipped with probability e is the DPO loss of the true ones.
    """
    logits = beta * _delta(policy, reference)
    kept, flipped = -logsigmoid(logits), -logsigmoid(-logits)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@loss("hinge")
def hinge_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta delta), RSO, arXiv 2309.06657; beta is one over the margin."""
    return torch.relu(1 - beta * _delta(policy, reference))


@loss("ipo")
def ipo_loss(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """`(r_w/|w| - r_l/|l| - 1/(2 beta))^2`, IPO, arXiv 2310.12036, eq. 17 with tau = beta.

    Means over tokens, as its authors confirmed; with sums the square would grow with the length.
    """
    return (_delta(policy / lengths, reference / lengths) - 1 / (2 * beta)) ** 2


@loss("exo_pair")
def exo_pair_loss(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """KL(q || [1-e, e]) with q = softmax(beta r) over the pair, EXO, arXiv 2402.00856, eq. 16."""
    logits = beta * _delta(policy, reference)
    log_q = torch.stack((logsigmoid(logits), logsigmoid(-logits)))
    target = log_q.new_tensor([[1 - label_smoothing], [label_smoothing]])
    return (log_q.exp() * (log_q - target.log())).sum(0)


@loss("nca_pair")
def nca_pair_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """-log s(b r_w) - [log s(-b r_w) + log s(-b r_l)] / 2, NCA for one pair, arXiv 2402.05369."""
    rewards = beta * (policy - reference)
    return -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards).mean(1)


@loss("bco_pair")
def bco_pair_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_l), BCO, arXiv 2404.04656, with a reward shift of 0.

    The paper's shift is a running mean over batches; a pure function of the pair has none.
    """
    rewards = beta * (policy - reference)
    return -logsigmoid(rewards[:, 0]) - logsigmoid(-rewards[:, 1])


@loss("sppo_hard")
def sppo_hard_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2, SPPO, arXiv 2405.00675, eq. 4.7.

    Win probabilities are taken as 1 and 0 and eta as 1/beta.
    """
    r = policy - reference
    return (r[:, 0] - 0.5 / beta) ** 2 + (r[:, 1] + 0.5 / beta) ** 2


def _by_rank(values: Tensor, others: Tensor) -> Tensor:
    """Return for each entry of `values` (P,) the entry of `others` (P,) of the same rank."""
    order = values.argsort(stable=True)
    # Scattered back to the order of `values`, so that row i belongs to pair i.
    return torch.zeros_like(others).scatter(0, order, others.sort().values)


@loss("aot")
def aot_loss(policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """L(u_(k) - v_(k)) by ranks k, u and v the policy's and reference's chosen - rejected.

    AOT on paired data, arXiv 2406.05882: u should dominate v in every quantile of the pairs given;
    L is DPO's loss. Rank and gradient of row i are those of pair i's u.
    """
    u, v = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    return _smoothed(beta * (u - _by_rank(u, v)), label_smoothing)


@loss("aot_unpaired")
def aot_unpaired_loss(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """L(r_w(k) - r_l(k)) by ranks k: chosen ratios should dominate rejected ones in every quantile.

    AOT on unpaired data, arXiv 2406.05882. Row i also has a gradient for the rejected answer of the
    same rank, usually of another pair: differentiate the sum over all rows, not single rows.
    """
    r = policy - reference
    return _smoothed(beta * (r[:, 0] - _by_rank(r[:, 0], r[:, 1])), label_smoothing)


@loss("apo_zero")
def apo_zero_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """1 - s(beta r_w) + s(beta r_l), APO, arXiv 2408.06266, eq. 7: chosen up, rejected down."""
    rewards = beta * (policy - reference)
    return torch.sigmoid(-rewards[:, 0]) + torch.sigmoid(rewards[:, 1])


@loss("apo_down")
def apo_down_loss(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """s(beta r_w) + 1 - s(beta delta), APO, arXiv 2408.06266, eq. 8: both down, rejected more."""
    rewards = beta * (policy - reference)
    return torch.sigmoid(rewards[:, 0]) + torch.sigmoid(rewards[:, 1] - rewards[:, 0])


@loss("discopop")
def discopop_loss(policy: Tensor, reference: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    """(1 - m) (-log s(x)) + m exp(-x), x = beta delta, m = s(x / tau), arXiv 2406.08414, eq. 5."""
    logits = beta * _delta(policy, reference)
    modulation = logits / discopop_tau
    # One exponent: exp(-x) alone overflows where m underflows, and inf * 0 is not a number.
    exponential = torch.exp(logsigmoid(modulation) - logits)
    return torch.sigmoid(-modulation) * -logsigmoid(logits) + exponential


@loss("sigmoid_norm")
def sigmoid_norm_loss(policy: Tensor, reference: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """`-log s(beta (r_w/|w| - r_l/|l|))`, length-normalised DPO, arXiv 2411.15124, section 5."""
    return -logsigmoid(beta * _delta(policy / lengths, reference / lengths))


@loss("simpo")
def simpo_loss(
    policy: Tensor, lengths: Tensor, *, beta: float, simpo_gamma: float, label_smoothing: float
) -> Tensor:
    """`-log s(beta (log p_w/|w| - log p_l/|l|) - gamma)`, SimPO, arXiv 2405.14734, eq. 6.

    gamma is the paper's target margin, in units of the reward: not multiplied by beta. Code with a
    `gamma_beta_ratio` g has gamma = g * beta.
    """
    mean = policy / lengths
    return _smoothed(beta * (mean[:, 0] - mean[:, 1]) - simpo_gamma, label_smoothing)


@loss("orpo")
def orpo_loss(policy: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """`NLL_w/|w| - beta log s(log odds_w - log odds_l)`, odds = p / (1 - p).

    ORPO, arXiv 2403.07691, eqs. 4, 6 and 7; beta is the paper's lambda. log p and the NLL are means
    over the target tokens of an answer.
    """
    log_p = policy / lengths
    # p = 1 has infinite odds; rounding reaches it, so stop one step short. log(-expm1(x)) and not
    # log1p(-exp(x)): the latter has no correct digit near x = 0, where its gradient is largest.
    below = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    log_odds = below - torch.log(-torch.expm1(below))
    return -log_p[:, 0] - beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


@loss("dpop")
def dpop_loss(policy: Tensor, reference: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    """-log s(beta (delta - lambda max(0, -r_w))), DPO-Positive, arXiv 2402.13228, eq. 3.

    The penalty keeps the chosen answer from becoming less likely than under the reference.
    """
    penalty = torch.relu(reference[:, 0] - policy[:, 0])
    return -logsigmoid(beta * (_delta(policy, reference) - dpop_lambda * penalty))
