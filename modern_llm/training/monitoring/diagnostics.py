"""Warnings about typical training problems, found in the logged metrics and printed once each.

Each rule is a function of the records logged so far. Its message names the symptom, its usual cause
and, after a semicolon, the setting to change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from modern_llm.config import TrainingConfig

Record = Mapping[str, float]

WINDOW = 3
"""Number of first and of last records that are compared: a single one is noise."""
FULL_RATE, SMALL = 1e-4, 10_000_000
"""Learning rate above which full fine-tuning is warned of, and parameters below which a model is
too small for that: its usual rates are higher."""
TIES, LEAK, EARLY = 0.9, 0.99, 0.2
FALL, GROWTH = 0.05, 0.1
LENGTH_RATIO = 1.5


def spinning_threads(device: str, threads: int, environment: Mapping[str, str]) -> str | None:
    """Return a hint if the threads of a CPU run spin while they wait for each other.

    OpenMP reads the variable when torch is imported: the command line sets it, a script must.
    """
    if device != "cpu" or threads < 2 or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        return None
    return (
        f"{threads} threads spin while they wait for each other, which is slow beside other work; "
        "set OMP_WAIT_POLICY=passive before Python starts"
    )


def learning_rate_warning(
    config: TrainingConfig, *, full: bool, new: bool, parameters: int | None = None
) -> str | None:
    """Return a warning if a pretrained model is fully fine-tuned at a high learning rate.

    Args:
        full: whether all weights are trained, not adapters.
        new: whether the model is trained from scratch.
        parameters: of the model, if known.
    """
    small = parameters is not None and parameters < SMALL
    if not full or new or small or config.learning_rate <= FULL_RATE:
        return None
    return (
        f"train.learning_rate {config.learning_rate:g} is above {FULL_RATE:g}: high for full "
        "fine-tuning, the model may forget what it has learnt; try 5e-6 for DPO, 2e-5 for SFT"
    )


class Diagnostics:
    """Applies the rules to every record; each rule warns once.

    Args:
        total: optimizer steps of the run.
    """

    def __init__(self, total: int):
        self._total = total
        self._records: list[Record] = []
        self._warned: set[str] = set()

    def look(self, record: Record) -> list[str]:
        """Return the new warnings after this record."""
        if "loss" not in record and "samples/policy_tokens" not in record:
            return []
        self._records = [*self._records[:WINDOW], *self._records[WINDOW:][-2 * WINDOW :], record]
        found = []
        for name, rule in RULES.items():
            if name not in self._warned and (text := rule(self._records, self._total)):
                self._warned.add(name)
                found.append(f"step {int(record['step'])}: {text}")
        return found


def _ends(records: Sequence[Record], name: str) -> tuple[list[float], list[float]] | None:
    """Return the first and the last `WINDOW` values of a metric, None if there are too few."""
    values = [record[name] for record in records if record.get(name) is not None]
    return (values[:WINDOW], values[-WINDOW:]) if len(values) >= 2 * WINDOW else None


def _of_kto(records: Sequence[Record]) -> bool:
    """Whether the run is of labelled responses."""
    return any("desirable" in record for record in records)


def stuck_at_ties(records: Sequence[Record], total: int) -> str | None:
    """Policy and reference still agree after several steps: the policy does not change."""
    ties = [record["ties"] for record in records if record.get("ties") is not None]
    ties = ties[1:] if records[0].get("step") == 1 else ties  # step 1 has only ties
    if len(ties) < WINDOW or min(ties[-WINDOW:]) < TIES:
        return None
    return (
        f"{ties[-1]:.0%} of the pairs are ties: the policy still equals the reference; raise "
        "train.learning_rate, or check that weights are trained"
    )


def likelihood_displacement(records: Sequence[Record], total: int) -> str | None:
    """Margins grow because both answers become less likely, the rejected one faster."""
    margins, logps = _ends(records, "rewards/margins"), _ends(records, "logps/chosen")
    rewards = _ends(records, "rewards/chosen")
    if not (margins and logps and rewards):
        return None
    grew = fmean(margins[1]) - fmean(margins[0]) > GROWTH
    fell = fmean(logps[1]) < fmean(logps[0]) - FALL * abs(fmean(logps[0]))
    # Rewards are relative to the reference of the same answer, so they vary less between batches.
    if not (grew and fell and max(rewards[1]) < 0):
        return None
    fix = "add dpo.nll_coefficient, use dpo.loss_type dpop"
    if _of_kto(records):
        fix = "raise kto.desirable_weight"
    return (
        "margins grow while the chosen answers become less likely (likelihood displacement); "
        f"{fix}, or lower train.learning_rate"
    )


def accuracy_too_good(records: Sequence[Record], total: int) -> str | None:
    """Accuracy is near 1 very early: the policy learns something other than the preference."""
    last = records[-1]
    values = [record.get("rewards/accuracies") for record in records[-2 * WINDOW :]]
    early = last.get("step", 0) <= EARLY * total
    if not early or len(values) < 2 * WINDOW or any(v is None or v < LEAK for v in values):
        return None
    return (
        f"accuracy is {last['rewards/accuracies']:.0%} this early; look with modern-llm inspect "
        "for something that reveals the chosen answers (length, format, end tokens)"
    )


def zero_gradient(records: Sequence[Record], total: int) -> str | None:
    """The gradient is zero: nothing is learnt."""
    if records[-1].get("grad_norm") != 0:
        return None
    section = "kto" if _of_kto(records) else "dpo"
    return (
        "the gradient norm is 0: nothing is learnt; check whether weights are frozen, the loss is "
        f"saturated (lower {section}.beta), or truncation removes the tokens that differ"
    )


def length_drift(records: Sequence[Record], total: int) -> str | None:
    """Answers to the fixed prompts have become much longer or shorter than at the start."""
    last = records[-1]
    policy, reference = last.get("samples/policy_tokens"), last.get("samples/reference_tokens")
    if not policy or not reference:
        return None
    ratio = policy / reference
    if 1 / LENGTH_RATIO < ratio < LENGTH_RATIO:
        return None
    word = "longer" if ratio > 1 else "shorter"
    other = "" if _of_kto(records) else ", or try dpo.loss_type sigmoid_norm or simpo"
    return (
        f"sample answers are {word} than the reference's ({policy:.0f} tokens, not "
        f"{reference:.0f}): the policy learns length; check the length bias of the data with "
        f"modern-llm inspect{other}"
    )


RULES: dict[str, Callable[[Sequence[Record], int], str | None]] = {
    "ties": stuck_at_ties,
    "displacement": likelihood_displacement,
    "leak": accuracy_too_good,
    "gradient": zero_gradient,
    "length": length_drift,
}
