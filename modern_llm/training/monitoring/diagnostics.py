"""Warnings that teach: what a person would see in the curves, said once while there is time.

Each rule looks at the records logged so far and says what it saw, what it usually means and which
setting to change. Plain functions of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from modern_llm.config import TrainingConfig

Record = Mapping[str, float]

WINDOW = 3
"""Records at the beginning and at the end that are compared: one alone is noise."""
FULL_RATE = 1e-4
TIES, LEAK, EARLY = 0.9, 0.99, 0.2
FALL, GROWTH = 0.05, 0.1
LENGTH_RATIO = 1.5


def learning_rate_warning(config: TrainingConfig, *, full: bool, new: bool) -> str | None:
    """Return a warning where all weights of a trained model are moved at a high rate.

    Args:
        full: whether all weights are trained, and not adapters.
        new: whether the model is made from scratch.
    """
    if not full or new or config.learning_rate <= FULL_RATE:
        return None
    return (
        f"train.learning_rate {config.learning_rate:g} is above {FULL_RATE:g}: high for a full "
        "fine-tuning, the model may forget what it knows; try 5e-6 for DPO, 2e-5 for SFT"
    )


class Diagnostics:
    """Looks at every record, and says each thing once.

    Args:
        total: optimizer steps of the run.
    """

    def __init__(self, total: int):
        self._total = total
        self._records: list[Record] = []
        self._said: set[str] = set()

    def look(self, record: Record) -> list[str]:
        """Return the warnings that this record is the first to give reason for."""
        if "loss" not in record and "samples/policy_tokens" not in record:
            return []
        self._records = [*self._records[:WINDOW], *self._records[WINDOW:][-2 * WINDOW :], record]
        found = []
        for name, rule in RULES.items():
            if name not in self._said and (text := rule(self._records, self._total)):
                self._said.add(name)
                found.append(f"step {int(record['step'])}: {text}")
        return found


def _ends(records: Sequence[Record], name: str) -> tuple[list[float], list[float]] | None:
    """The first and the last few values of a metric, None while there are too few."""
    values = [record[name] for record in records if record.get(name) is not None]
    return (values[:WINDOW], values[-WINDOW:]) if len(values) >= 2 * WINDOW else None


def stuck_at_ties(records: Sequence[Record], total: int) -> str | None:
    """Policy and reference give the same numbers, although steps were taken."""
    ties = [record["ties"] for record in records if record.get("ties") is not None]
    ties = ties[1:] if records[0].get("step") == 1 else ties  # step 1 has only ties
    if len(ties) < WINDOW or min(ties[-WINDOW:]) < TIES:
        return None
    return (
        f"{ties[-1]:.0%} of the pairs are ties: the policy still equals the reference; raise "
        "train.learning_rate, or see whether any weight is trained"
    )


def likelihood_displacement(records: Sequence[Record], total: int) -> str | None:
    """Margins grow because both answers become less likely, the rejected one faster."""
    margins, logps = _ends(records, "rewards/margins"), _ends(records, "logps/chosen")
    rewards = _ends(records, "rewards/chosen")
    if not (margins and logps and rewards):
        return None
    grew = fmean(margins[1]) - fmean(margins[0]) > GROWTH
    fell = fmean(logps[1]) < fmean(logps[0]) - FALL * abs(fmean(logps[0]))
    # Rewards compare each chosen answer with its own reference: other batches do not blur them.
    if not (grew and fell and max(rewards[1]) < 0):
        return None
    return (
        "margins grow while the chosen answers become less likely (likelihood displacement): add "
        "dpo.nll_coefficient, use dpo.loss_type dpop, or lower train.learning_rate"
    )


def accuracy_too_good(records: Sequence[Record], total: int) -> str | None:
    """Every pair is told apart almost at once: something else than the preference is learnt."""
    last = records[-1]
    values = [record.get("rewards/accuracies") for record in records[-2 * WINDOW :]]
    early = last.get("step", 0) <= EARLY * total
    if not early or len(values) < 2 * WINDOW or any(v is None or v < LEAK for v in values):
        return None
    return (
        f"accuracy is {last['rewards/accuracies']:.0%} this early: look for a mark that gives the "
        "chosen answers away (length, format, end tokens) with modern-llm inspect"
    )


def zero_gradient(records: Sequence[Record], total: int) -> str | None:
    """Nothing can be learnt from a gradient of zero."""
    if records[-1].get("grad_norm") != 0:
        return None
    return (
        "the gradient norm is 0: nothing is learnt; see whether weights are frozen, the loss is "
        "saturated (lower dpo.beta), or the learning signal is cut off by truncation"
    )


def length_drift(records: Sequence[Record], total: int) -> str | None:
    """The answers to the fixed prompts become much longer or shorter than at the start."""
    last = records[-1]
    policy, reference = last.get("samples/policy_tokens"), last.get("samples/reference_tokens")
    if not policy or not reference:
        return None
    ratio = policy / reference
    if 1 / LENGTH_RATIO < ratio < LENGTH_RATIO:
        return None
    word = "longer" if ratio > 1 else "shorter"
    return (
        f"sample answers are {word} than the reference's ({policy:.0f} tokens, not "
        f"{reference:.0f}): the policy learns length; see modern-llm inspect for the length bias "
        "of the data, and dpo.loss_type sigmoid_norm or simpo"
    )


RULES: dict[str, Callable[[Sequence[Record], int], str | None]] = {
    "ties": stuck_at_ties,
    "displacement": likelihood_displacement,
    "leak": accuracy_too_good,
    "gradient": zero_gradient,
    "length": length_drift,
}
