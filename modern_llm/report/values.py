"""Results of runs as text: last and best values of the metrics, and a ranking of several runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from modern_llm.report.runs import Run


@dataclass(frozen=True)
class Metric:
    """One metric of the results: title, name in `metrics.jsonl`, format, and which end is best."""

    title: str
    name: str
    form: str
    best: Literal["low", "high"] | None = None

    def text(self, value: float | None) -> str:
        """Return a value as text."""
        if value is None:
            return "—"
        return duration(value) if self.name == "elapsed_s" else self.form.format(value)

    def best_of(self, run: Run) -> tuple[int, float] | None:
        """Return step and value of the best point of a run, the earliest of equal ones."""
        if self.best is None or self.name not in run.series:
            return None
        steps, values = run.series[self.name]
        at = int(values.argmin() if self.best == "low" else values.argmax())
        return int(steps[at]), float(values[at])


HEADLINES = (
    Metric("loss", "loss", "{:.4f}", "low"),
    Metric("evaluation loss", "eval/loss", "{:.4f}", "low"),
    Metric("accuracy", "rewards/accuracies", "{:.1%}", "high"),
    Metric("evaluation accuracy", "eval/rewards/accuracies", "{:.1%}", "high"),
    Metric("Kendall's tau", "rewards/kendall", "{:.3f}", "high"),
    Metric("evaluation Kendall's tau", "eval/rewards/kendall", "{:.3f}", "high"),
    Metric("margin", "rewards/margins", "{:.3f}", "high"),
    Metric("evaluation margin", "eval/rewards/margins", "{:.3f}", "high"),
    Metric("KL divergence", "kl", "{:.3f}"),
    Metric("evaluation KL divergence", "eval/kl", "{:.3f}"),
    Metric("perplexity", "perplexity", "{:.2f}", "low"),
    Metric("evaluation perplexity", "eval/perplexity", "{:.2f}", "low"),
    Metric("tokens/s", "tokens_per_second", "{:,.0f}", "high"),
    Metric("MFU", "mfu", "{:.1%}", "high"),
    Metric("memory, GB", "memory_gb", "{:.2f}"),
    Metric("examples", "examples", "{:,.0f}"),
    Metric("time", "elapsed_s", "{}"),
)
RANKED_BY = ("eval/rewards/accuracies", "eval/loss", "rewards/accuracies", "loss")
"""The first of these that a run has ranks runs that name no `train.best_metric`. Accuracy is first,
because the losses of runs with different beta cannot be compared."""


def results(run: Run) -> list[dict[str, Any]]:
    """Return title, last and best value, and the step of the best, of each metric of a run."""
    rows = []
    for metric in HEADLINES:
        if (last := run.last(metric.name)) is None:
            continue
        step, best = metric.best_of(run) or (None, None)
        best = metric.text(best)
        rows.append({"title": metric.title, "last": metric.text(last), "best": best, "step": step})
    return rows


def ranking(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the runs in order of the last value of one metric, best first.

    Returns:
        `by` (title of that metric), `titles` of the columns, and `rows` with `at` (number of the
        run), `label`, `best`, `step` and `values`. Runs without the metric come last.
    """
    shown = [m for m in HEADLINES if any(m.name in run.series for run in runs)]
    by = _named(runs, shown)
    by = by or next((m for name in RANKED_BY for m in shown if m.name == name), None)
    # Equal accuracies are common in small evaluations: the larger margin wins.
    tie = next((m for m in shown if by and m.name == by.name.replace("accuracies", "margins")), by)

    def place(at: int) -> tuple[float, ...]:
        keys = []
        for metric in (by, tie):
            last = runs[at].last(metric.name) if metric else None
            missing = float("inf") if last is None else last
            keys.append(missing if last is None or metric.best == "low" else -missing)
        return (*keys, at)

    others = [metric for metric in shown if metric is not by]
    rows = []
    for at in sorted(range(len(runs)), key=place):
        run = runs[at]
        step, best = (by.best_of(run) if by else None) or (None, None)
        columns = [by, *others] if by else others
        rows.append(
            {
                "at": at,
                "label": run.label,
                "best": by.text(best) if by else "—",
                "step": step,
                "values": [metric.text(run.last(metric.name)) for metric in columns],
            }
        )
    return {
        "by": by.title if by else None,
        "titles": [metric.title for metric in ([by] if by else []) + others],
        "rows": rows,
    }


def _named(runs: Sequence[Run], shown: Sequence[Metric]) -> Metric | None:
    """Return the `train.best_metric` of all runs, None if they differ or did not log it."""
    names = {str(run.config.get("train.best_metric") or "") for run in runs}
    name = names.pop()
    if names or not any(name in run.series for run in runs):
        return None
    # Metrics without a headline are better when higher: losses and perplexity have one.
    return next((m for m in shown if m.name == name), Metric(name, name, "{:.4g}", "high"))


def dropped(source: dict[str, Any]) -> str:
    """Return e.g. `12 of 1,000 rows (1.2%): 10 equal responses, 2 empty prompt`."""
    drops = source["drops"]
    count = sum(drops.values())
    if not count:
        return "none"
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in drops.items())
    share = f" of {source['rows']:,} rows ({count / source['rows']:.1%})" if source["rows"] else ""
    return f"{count:,}{share}: {reasons}"


def cell(value: Any) -> str:
    """Return a configuration value as text."""
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def duration(seconds: float) -> str:
    """Return e.g. `2 h 05 min`, `3 min 20 s`, `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
