"""The preference losses: one function each, decorated with the loss's name in `catalogue`.

Letters: P pairs; `policy`, `reference` and `lengths` are (P, 2), column 0 = chosen (w in papers),
column 1 = rejected (l); log-probs are sums over the target tokens in nats; `r` is the log-ratio
policy - reference (P, 2); delta = r_w - r_l (P,); s is the logistic function, e label_smoothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
"""Name in the catalogue -> function; filled by `loss`."""


def loss(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorate the function of the catalogue's loss `name`."""

    def noted(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FUNCTIONS[name] = function
        return function

    return noted


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


@loss("sft")
def sft_loss(policy: Tensor, lengths: Tensor, *, beta: float) -> Tensor:
    """NLL_w / m, m the step's mean number of chosen tokens: their mean NLL, arXiv 2411.10442.

    The mean over the pairs of a step is that over the chosen tokens of the step, as TRL has it; the
    paper takes the mean of each answer first, which is `nll_coefficient`. beta has no part in it.
    """
    return -policy[:, 0] / lengths[:, 0]


@loss("plackett_luce")
def plackett_luce_loss(policy: Tensor, reference: Tensor, levels: Tensor, *, beta: float) -> Tensor:
    """-sum_k [beta r_k - log sum_{j in {k} + worse than k} exp(beta r_j)], DPO of rankings.

    arXiv 2305.18290, appendix A.3, eq. 20. Here the inputs are (P, K); `levels` has 0 for the best
    response, more for worse ones, and -1 where a ranking has fewer. Responses of one level tie and
    are not compared with each other. With K = 2 it is the loss `sigmoid`.
    """
    rewards = beta * (policy - reference)
    rivals = worse_than(levels) | torch.eye(levels.shape[1], dtype=torch.bool, device=levels.device)
    shown = rewards[:, None, :].masked_fill(~rivals, float("-inf"))
    return (shown.logsumexp(-1) - rewards).sum(1)


def worse_than(levels: Tensor) -> Tensor:
    """Return (P, K, K) bool: whether response [p, j] ranks below response [p, k], at [p, k, j]."""
    return (levels[:, :, None] < levels[:, None, :]) & (levels[:, :, None] >= 0)
