"""Warnings from the numbers of `examine`, each with the setting to change.

Plain functions of numbers, each with the threshold of its warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modern_llm.data.inspect.statistics import Examined, shared_rows
from modern_llm.data.read.records import BROKEN
from modern_llm.data.table.iterate import FELL_BACK

# Shares above which a finding is worth a line.
CUT_PROMPTS, CUT_ANSWERS, REPEATED, LONGER_CHOSEN = 0.05, 0.01, 0.01, 0.6
LENGTH_RATIO = 1.2
GPU_TOKENS = 16_384
"""Tokens of one forward that a GPU takes by default."""
LENGTHS = {"preferences": "dpo", "labelled": "kto"}
"""Section with `max_length`, where that is not the data section."""
ALPHA_Z = 3.0
"""Standard errors that the mean length difference must be away from 0: fewer are chance."""


@dataclass(frozen=True)
class Setup:
    """Settings of the run that reads the data, as far as they are known."""

    kind: str
    max_length: int
    batch_size: int
    max_dropped: float
    on_bad_row: str
    tokens: int | None = None
    """Most tokens of one forward on one process; None where the device decides."""
    processes: int = 1
    """Those that share a forward."""


@dataclass(frozen=True)
class Finding:
    """A warning and the setting that fixes it ("" if only the data can be fixed)."""

    source: str
    message: str
    setting: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding as JSON values."""
        return {"source": self.source, "message": self.message, "setting": self.setting}


def repeated(values: NDArray[np.int64]) -> int:
    """Return the number of repeated values."""
    return len(values) - len(np.unique(values))


def contradictions(found: Examined) -> int:
    """Return the rows for which another row prefers the same two answers the other way round."""
    return int(np.isin(found.pairs, found.swapped).sum()) if len(found.columns) == 3 else 0


def length_bias(found: Examined) -> dict[str, float] | None:
    """Return how the chosen answers differ from the rejected in trained tokens, of pairs only.

    Returns:
        mean difference in tokens, its standard error, the share of pairs whose chosen answer is
        the longer one (ties counted half), and the ratio of the mean lengths.
    """
    if "chosen" not in found.whole or not len(found.whole["chosen"]):
        return None
    counts = found.trained or found.whole
    chosen, rejected = counts["chosen"], counts["rejected"]
    difference = chosen - rejected
    return {
        "mean_difference": round(float(difference.mean()), 3),
        "standard_error": round(float(difference.std() / max(len(difference), 1) ** 0.5), 3),
        "chosen_longer": round(float((difference > 0).mean() + (difference == 0).mean() / 2), 4),
        "ratio": round(float(chosen.mean() / max(rejected.mean(), 1e-9)), 4),
    }


def findings(sources: Sequence[Examined], setup: Setup) -> list[Finding]:
    """Return every warning about the sources, the most harmful kinds first."""
    found: list[Finding] = []
    for source in sources:
        for rule in RULES:
            found += [Finding(source.name, *entry) for entry in rule(source, setup)]
    return found + _leakage(sources) + _too_few(sources, setup)


Entries = list[tuple[str, str]]


def _broken(source: Examined, setup: Setup) -> Entries:
    count = source.report.drops.get(BROKEN, 0)
    if not count or setup.on_bad_row == "skip":
        return []
    return [(f"{count:,} rows are broken in structure and would stop the run", "data.on_bad_row")]


def _dropped(source: Examined, setup: Setup) -> Entries:
    report = source.report
    content = report.dropped - report.drops.get(BROKEN, 0)
    share = content / max(report.rows, 1)
    if share <= setup.max_dropped:
        return []
    text = f"{share:.1%} of the rows cannot be learnt from, above max_dropped; the run would stop"
    return [(text, "data.max_dropped")]


def _truncated(source: Examined, setup: Setup) -> Entries:
    rows = max(len(source.pairs), 1)
    total = source.whole[source.columns[0]] + np.max(
        [source.whole[name] for name in source.columns[1:]] or [[0] * rows], axis=0
    )
    enough = int(np.ceil((np.percentile(total, 99) + 1) / 8) * 8) if len(total) else 0
    setting = f"{LENGTHS.get(setup.kind, 'data')}.max_length"
    entries = []
    for at, name in enumerate(source.columns):
        share, bound = source.cut.get(name, 0) / rows, CUT_ANSWERS if at else CUT_PROMPTS
        if share > bound:
            lost = "lose their end and are trained without an end token" if at else "lose the start"
            text = f"{share:.1%} of {name} texts {lost} at {setup.max_length} tokens"
            entries.append((f"{text}; 99% of the rows fit {enough}", setting))
    return entries


def _long(source: Examined, setup: Setup) -> Entries:
    if "prompt" not in source.columns or not len(source.pairs):
        return []
    # All responses to a prompt are computed together.
    tokens = np.sum([source.kept[name] for name in source.columns], axis=0)
    one, longest = setup.tokens or GPU_TOKENS, int(tokens.max())
    budget = one * setup.processes
    if longest <= budget:
        return []
    share = float((tokens > budget).mean())
    parts = 1 << max(0, (-(-longest // one) - 1).bit_length())
    place = "of train.tokens_per_micro_batch, and the run would stop"
    if setup.tokens is None:
        place = "that a GPU takes in one forward by default"
    text = (
        f"{share:.1%} of the rows have more tokens than the {budget:,} {place}; the longest has "
        f"{longest:,}: on one process set tokens_per_micro_batch {longest}, gradient_checkpointing "
        f"true and mlp_chunk 8192, or let {parts} processes share each row"
    )
    return [(text, f"train.sequence_parallel: {parts}")]


def _unended(source: Examined, setup: Setup) -> Entries:
    entries = []
    for name, count in source.unended.items():
        share = (count - source.cut.get(name, 0)) / max(len(source.pairs), 1)
        if share > 0:
            text = f"{share:.1%} of {name} answers close without an end token: the model learns "
            entries.append((text + "never to stop", "data.append_end_token"))
    return entries


def _repetitions(source: Examined, setup: Setup) -> Entries:
    rows, entries = max(len(source.pairs), 1), []
    if (share := repeated(source.pairs) / rows) > REPEATED:
        entries.append((f"{share:.1%} of the rows repeat another row word for word", ""))
    if count := contradictions(source):
        text = f"{count:,} rows prefer what another row rejects"
        entries.append((text, "dpo.label_smoothing"))
    if source.score_ties:
        text = f"{source.score_ties:,} rows have the same score on both sides: a tie says nothing"
        entries.append((text, "dpo.label_smoothing"))
    return entries


def _longer(source: Examined, setup: Setup) -> Entries:
    bias = length_bias(source)
    if bias is None or abs(bias["mean_difference"]) < ALPHA_Z * bias["standard_error"]:
        return []
    share, ratio = bias["chosen_longer"], bias["ratio"]
    even = 1 - LONGER_CHOSEN < share < LONGER_CHOSEN and 1 / LENGTH_RATIO < ratio < LENGTH_RATIO
    if even:
        return []
    word = "longer" if bias["mean_difference"] > 0 else "shorter"
    text = (
        f"chosen answers are {word} than rejected ones: {ratio:.2f} times as long on average, the "
        f"longer one in {share:.0%} of the pairs; DPO will learn length: consider a "
        "length-normalised loss (sigmoid_norm, simpo)"
    )
    return [(text, "dpo.loss_type")]


def _one_label(source: Examined, setup: Setup) -> Entries:
    found = source.report.values.get("label")
    if found is None or found["min"] != found["max"] or source.role != "train":
        return []
    word = "desirable" if found["max"] else "undesirable"
    return [(f"every row is labelled {word}: KTO needs both labels; the run would stop", "")]


def _template(source: Examined, setup: Setup) -> Entries:
    return [(FELL_BACK, "data.template")] if FELL_BACK in source.report.notes else []


def _empty_prompts(source: Examined, setup: Setup) -> Entries:
    if len(source.columns) < 2 or not (count := int((source.whole["prompt"] == 0).sum())):
        return []
    return [(f"{count:,} prompts are empty: the first token of their answers is no target", "")]


RULES: tuple[Callable[[Examined, Setup], Entries], ...] = (
    _broken,
    _dropped,
    _truncated,
    _long,
    _unended,
    _repetitions,
    _longer,
    _one_label,
    _template,
    _empty_prompts,
)


def _sides(sources: Sequence[Examined]) -> tuple[list[Examined], list[Examined]]:
    train = [source for source in sources if source.role == "train"]
    return train, [source for source in sources if source.role != "train"]


def leakage(sources: Sequence[Examined]) -> dict[str, int]:
    """Return evaluation rows, and how many of them the training data knows."""
    return shared_rows(*_sides(sources))


def _leakage(sources: Sequence[Examined]) -> list[Finding]:
    shared = leakage(sources)
    if not shared["same_prompt"]:
        return []
    text = (
        f"{shared['same_prompt']:,} of {shared['evaluation_rows']:,} evaluation rows have a prompt "
        f"that is trained on, {shared['same_pair']:,} of them with the same answers: the "
        "evaluation will look better than the model is"
    )
    cure = "data.eval_fraction" if _sides(sources)[1] else ""
    return [Finding("evaluation", text, cure)]


def training_rows(sources: Sequence[Examined]) -> float:
    """Return the examples of one epoch: what is not held out, by weight."""
    return sum(s.weight * s.report.examples for s in _sides(sources)[0])


def _too_few(sources: Sequence[Examined], setup: Setup) -> list[Finding]:
    rows = training_rows(sources)
    if setup.kind == "documents" or rows >= setup.batch_size:
        return []
    text = f"{rows:.0f} examples are fewer than one batch of {setup.batch_size}; the run would stop"
    return [Finding("training", text, "train.batch_size")]


def prefix_saving(source: Examined) -> dict[str, Any] | None:
    """Return the tokens of one pass with every prompt computed once a pair, and twice."""
    if len(source.columns) != 3:
        return None
    shared = int(sum(values.sum() for values in source.kept.values()))
    separate = shared + int(source.kept["prompt"].sum())
    return {
        "shared_tokens": shared,
        "separate_tokens": separate,
        "saving": round(1 - shared / max(separate, 1), 4),
    }
