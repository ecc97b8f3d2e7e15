"""Table of the preference losses: paper, inputs and options of each, without torch.

A configuration can be checked, and `--help` printed, before torch is imported. A new loss is one
row here and one function in `losses.py`, decorated with `@loss("its name")`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType


@dataclass(frozen=True)
class Interval:
    """Range of the values of an option, with the reason for it as half a sentence."""

    low: float
    high: float
    reason: str
    low_open: bool = False
    high_open: bool = True

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.low_open else "[", ")" if self.high_open else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


BETA = Interval(0.0, math.inf, "it scales every reward", low_open=True)

# Options of every loss: the NLL term on the chosen answer is added outside the loss functions.
COMMON_OPTIONS: Mapping[str, float] = MappingProxyType({"nll_coefficient": 0.0})

INTERVALS: Mapping[str, Interval] = MappingProxyType(
    {
        "nll_coefficient": Interval(0.0, math.inf, "it weighs the NLL of the chosen answer"),
        "label_smoothing": Interval(
            0.0, 0.5, "it is the share of flipped labels, and from one half on labels say nothing"
        ),
        # Above 1 the exponential term grows faster than its weight falls.
        "discopop_tau": Interval(
            0.0, 1.0, "above 1 the loss grows exponentially", low_open=True, high_open=False
        ),
        "simpo_gamma": Interval(0.0, math.inf, "it is the reward margin to reach"),
        "dpop_lambda": Interval(0.0, math.inf, "it weighs a penalty"),
        "f_alpha": Interval(
            0.0, 1.0, "at 0 it is the forward, at 1 the reverse KL divergence", high_open=False
        ),
    }
)

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
F_ALPHA = 0.5
"""Default of `f_alpha`, the alpha of `alpha_divergence`."""
NLL = "nll"
"""Name of the term that `nll_coefficient` weighs, beside the names of the losses."""

_EXO_SMOOTHING = Interval(
    0.0, 0.5, "the target is [1 - label_smoothing, label_smoothing] under a log", low_open=True
)


@dataclass(frozen=True)
class LossRow:
    """One preference loss.

    `reference`: uses the reference's log-probs. `lengths`: uses the numbers of target tokens.
    `across_pairs`: compares pairs, so that it needs all pairs of an optimizer step at once.
    `mean_lengths`: its `lengths` are the means over the optimizer step. `divergence`: reads the
    log-ratios by their difference alone, so that another f-divergence may replace the reverse KL.
    `margin`: a function of beta times a difference, from which a pair's margin can be subtracted.
    `ranking`: a function of K responses and their levels instead of a pair.
    `own`: registered by a user. `options`: options besides beta and `COMMON_OPTIONS`, with
    defaults. `intervals`: ranges that differ from `INTERVALS`. `paper`: authors, arXiv number, and
    the equation if there is one.
    """

    name: str
    paper: str
    reference: bool = True
    lengths: bool = False
    across_pairs: bool = False
    mean_lengths: bool = False
    divergence: bool = False
    margin: bool = False
    ranking: bool = False
    own: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "intervals", MappingProxyType(dict(self.intervals)))

    def interval(self, option: str) -> Interval:
        """Return the range of `option` with this loss."""
        return self.intervals.get(option) or INTERVALS[option]


_SMOOTHING = {"label_smoothing": 0.0}

_ROWS = (
    LossRow(
        "sigmoid",
        "DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7 (smoothed: cDPO, Mitchell 2023)",
        margin=True,
        divergence=True,
        options=_SMOOTHING,
    ),
    LossRow(
        "robust",
        "robust DPO, Chowdhury et al. 2024, arXiv 2403.00409",
        margin=True,
        divergence=True,
        options=_SMOOTHING,
    ),
    LossRow(
        "hinge",
        "RSO, Liu et al. 2023, arXiv 2309.06657 (SLiC, 2305.10425)",
        divergence=True,
        margin=True,
    ),
    LossRow(
        "ipo", "IPO, Azar et al. 2023, arXiv 2310.12036, eq. 17", lengths=True, divergence=True
    ),
    LossRow(
        "exo_pair",
        "EXO, Ji et al. 2024, arXiv 2402.00856, eq. 16",
        margin=True,
        divergence=True,
        options={"label_smoothing": 1e-3},
        intervals={"label_smoothing": _EXO_SMOOTHING},
    ),
    LossRow("nca_pair", "NCA, Chen et al. 2024, arXiv 2402.05369"),
    LossRow("bco_pair", "BCO, Jung et al. 2024, arXiv 2404.04656"),
    LossRow("sppo_hard", "SPPO, Wu et al. 2024, arXiv 2405.00675, eq. 4.7"),
    LossRow(
        "aot",
        "AOT on paired data, Melnyk et al. 2024, arXiv 2406.05882",
        across_pairs=True,
        options=_SMOOTHING,
    ),
    LossRow(
        "aot_unpaired",
        "AOT on unpaired data, Melnyk et al. 2024, arXiv 2406.05882",
        across_pairs=True,
        options=_SMOOTHING,
    ),
    LossRow("apo_zero", "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7"),
    LossRow("apo_down", "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8"),
    LossRow(
        "discopop",
        "DiscoPOP, Lu et al. 2024, arXiv 2406.08414, eq. 5",
        margin=True,
        divergence=True,
        options={"discopop_tau": 0.05},
    ),
    LossRow(
        "sigmoid_norm",
        "length-normalised DPO, Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 5",
        margin=True,
        lengths=True,
        divergence=True,
    ),
    LossRow(
        "simpo",
        "SimPO, Meng et al. 2024, arXiv 2405.14734, eq. 6",
        margin=True,
        reference=False,
        lengths=True,
        options={"simpo_gamma": 0.5, **_SMOOTHING},
    ),
    LossRow(
        "orpo",
        "ORPO, Hong et al. 2024, arXiv 2403.07691, eqs. 4, 6 and 7",
        reference=False,
        lengths=True,
    ),
    LossRow(
        "dpop",
        "DPO-Positive, Pal et al. 2024 (Smaug), arXiv 2402.13228, eq. 3",
        margin=True,
        options={"dpop_lambda": 50.0},
    ),
    LossRow(
        "sft",
        "generation loss of MPO, Wang et al. 2024, arXiv 2411.10442; a mean over tokens",
        reference=False,
        lengths=True,
        mean_lengths=True,
    ),
    LossRow(
        "plackett_luce",
        "DPO of rankings, Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, eq. 20",
        ranking=True,
    ),
)

_ALL = {row.name: row for row in _ROWS}
LOSSES: Mapping[str, LossRow] = MappingProxyType(_ALL)


def add_row(row: LossRow) -> None:
    """Add the row of a user's loss, or replace an earlier one; see `register_loss`."""
    _ALL[row.name] = row


def names_of(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of one loss or of a list of losses."""
    return tuple(loss_type) if isinstance(loss_type, (list, tuple)) else (loss_type,)


def rows_of(loss_type: str | Sequence[str]) -> list[LossRow]:
    """Return the rows of one loss or of a list of losses, unknown names left out."""
    return [LOSSES[name] for name in names_of(loss_type) if name in LOSSES]


def coefficients_of(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    nll_coefficient: float = 0.0,
) -> dict[str, float]:
    """Return the coefficient of each term of the total loss: by default 1 for every loss."""
    names = names_of(loss_type)
    found = dict(zip(names, loss_weights or [1.0] * len(names), strict=True))
    return found | ({NLL: nll_coefficient} if nll_coefficient > 0 else {})


def check_options(
    loss_type: str | Sequence[str],
    options: Mapping[str, object],
    *,
    beta: object,
    loss_weights: Sequence[object] | None = None,
    f_divergence: str = DIVERGENCES[0],
) -> list[str]:
    """Return all problems of these settings, one line each; an empty list means they are valid.

    `options` are all settings besides beta. None means not set, as does a `label_smoothing` of 0
    for a loss that does not take it, because the configuration always has that field. Of several
    losses, each takes the options that it has.
    """
    names = names_of(loss_type)
    rows = rows_of(names)
    problems = [_unknown_loss(name) for name in names if name not in LOSSES]
    problems += _list_problems(names, loss_weights)
    problems += _out_of_bounds("beta", beta, BETA, "any loss")
    if not rows or len(rows) < len(names):
        return problems
    problems += _divergence_problems(rows, f_divergence, options.get("f_alpha"))
    for option, value in options.items():
        if value is None or option == "f_alpha":
            continue
        takers = [row for row in rows if option in row.options]
        if takers or option in COMMON_OPTIONS:
            for row in takers or rows[:1]:
                place = f"loss_type={row.name!r}"
                problems += _out_of_bounds(option, value, row.interval(option), place)
        elif option != "label_smoothing" or value != 0:
            problems.append(_not_taken(option, value, rows))
    return problems


def _list_problems(names: tuple[str, ...], loss_weights: Sequence[object] | None) -> list[str]:
    """Return what is wrong with a list of losses and their weights."""
    problems = []
    if not names:
        problems.append(f"loss_type is empty: choose from {', '.join(LOSSES)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"loss_type names {name!r} twice: keep one" for name in twice]
    if loss_weights is None:
        return problems
    if len(names) == 1:
        problems.append("loss_weights has no effect with one loss: remove it")
    elif len(loss_weights) != len(names):
        problems.append(
            f"loss_weights has {len(loss_weights)} numbers for {len(names)} losses: give one each"
        )
    interval = Interval(0.0, math.inf, "it weighs a loss", low_open=True)
    for weight in loss_weights:
        problems += _out_of_bounds("loss_weights", weight, interval, "any loss")
    return problems


def _divergence_problems(rows: list[LossRow], f_divergence: str, alpha: object) -> list[str]:
    """Return what is wrong with an f-divergence for these losses."""
    if f_divergence not in DIVERGENCES:
        return [
            f"f_divergence={f_divergence!r} is not a known divergence"
            f"{_close(f_divergence, DIVERGENCES)}: choose one of {', '.join(DIVERGENCES)}"
        ]
    problems = []
    if alpha is not None and f_divergence != "alpha_divergence":
        problems.append(
            f"f_alpha={alpha!r} would have no effect with f_divergence={f_divergence!r}: remove it"
        )
    elif alpha is not None:
        problems += _out_of_bounds("f_alpha", alpha, INTERVALS["f_alpha"], "alpha_divergence")
    if f_divergence == DIVERGENCES[0]:
        return problems
    # A loss of lengths alone (sft) has no log-ratio to transform.
    refused = [row.name for row in rows if not row.divergence and not row.mean_lengths]
    able = [row.name for row in LOSSES.values() if row.divergence]
    problems += [
        f"f_divergence={f_divergence!r} is not defined for loss_type={name!r}: remove it, or "
        f"choose from {', '.join(able)}"
        for name in refused
    ]
    if not refused and not any(row.divergence for row in rows):
        problems.append(
            f"f_divergence={f_divergence!r} would have no effect with loss_type={rows[0].name!r}: "
            f"remove it, or choose from {', '.join(able)}"
        )
    return problems


def resolve_options(loss_type: str, options: Mapping[str, float | None]) -> dict[str, float]:
    """Return every option of this loss with its value, from `options` or by default.

    `options` must have passed `check_options`.
    """
    row = LOSSES[loss_type]
    defaults = {**row.options, **COMMON_OPTIONS}
    given = {option: options.get(option) for option in defaults}
    return {
        option: default if given[option] is None else float(given[option])
        for option, default in defaults.items()
    }


def _out_of_bounds(option: str, value: object, interval: Interval, place: str) -> list[str]:
    # True equals 1 in Python, but `label_smoothing: true` in a file is a mistake.
    if isinstance(value, bool) or not isinstance(value, Real):
        return [f"{option}={value!r} is not a number: give one in {interval}"]
    if value not in interval:
        return [
            f"{option}={value!r} is outside {interval} for {place}: {interval.reason}; "
            f"choose a value inside"
        ]
    return []


def _not_taken(option: str, value: object, rows: list[LossRow]) -> str:
    takers = [other.name for other in LOSSES.values() if option in other.options]
    names = " + ".join(repr(row.name) for row in rows)
    if takers:
        return (
            f"{option}={value!r} would have no effect with loss_type={names}: remove it, or "
            f"choose a loss that takes it ({', '.join(takers)})"
        )
    own = [*(option for row in rows for option in row.options), *COMMON_OPTIONS]
    return (
        f"{option}={value!r} is not an option of any loss{_close(option, INTERVALS)}: remove it; "
        f"loss_type={names} takes {', '.join(own)}"
    )


def _unknown_loss(loss_type: object) -> str:
    return (
        f"loss_type={loss_type!r} is not a known loss{_close(loss_type, LOSSES)}: "
        f"choose one of {', '.join(LOSSES)}"
    )


def _close(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
