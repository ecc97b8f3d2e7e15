"""Panels of a report: metrics by step as SVG, drawn by matplotlib.

Colours are placeholders that are replaced by CSS variables, so that one drawing works in light and
dark mode. Each panel also has its points and the position of its axes: the page's script shows the
values at the pointer, and draws the panel again when it is smoothed or zoomed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import numpy as np

from modern_llm.config.printable import printable
from modern_llm.report.runs import Floats, Run

COLOURS = 32
"""Runs with a colour of their own; the 33rd has that of the first."""
WIDTH, HEIGHT = 4.6, 2.7
"""In inches; an SVG unit is 1/72 inch."""
MARK_INK, MARK_GRID = "#abcff0", "#abcff1"
MOST_POINTS, MOST_BESIDE_OTHERS, ALL_POINTS = 400, 100, 36_000


@dataclass(frozen=True)
class Line:
    """One metric of a panel: name in `metrics.jsonl`, title and line style."""

    metric: str
    title: str = ""
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One figure of the report; `lines` that no run has are omitted."""

    title: str
    lines: tuple[Line, ...]
    percent: bool = False


PANELS = (
    Panel("Loss", (Line("loss", "training"), Line("eval/loss", "evaluation", "o--"))),
    Panel(
        "Reward accuracy",
        (
            Line("rewards/accuracies", "training"),
            Line("eval/rewards/accuracies", "evaluation", "o--"),
        ),
        percent=True,
    ),
    Panel(
        "Kendall's tau of the rewards",
        (Line("rewards/kendall", "training"), Line("eval/rewards/kendall", "evaluation", "o--")),
    ),
    Panel(
        "Reward margin",
        (Line("rewards/margins", "training"), Line("eval/rewards/margins", "evaluation", "o--")),
    ),
    Panel(
        "Rewards", (Line("rewards/chosen", "chosen"), Line("rewards/rejected", "rejected", "--"))
    ),
    Panel(
        "KL divergence from the reference, nats",
        (Line("kl", "training"), Line("eval/kl", "evaluation", "o--")),
    ),
    Panel(
        "Log-probs of the answers",
        (Line("logps/chosen", "chosen"), Line("logps/rejected", "rejected", "--")),
    ),
    Panel(
        "Perplexity",
        (Line("perplexity", "training"), Line("eval/perplexity", "evaluation", "o--")),
    ),
    Panel(
        "Length of sample answers, tokens",
        (
            Line("samples/policy_tokens", "policy", "o-"),
            Line("samples/reference_tokens", "reference", "o--"),
        ),
    ),
    Panel("Gradient norm", (Line("grad_norm"),)),
    Panel("Learning rate", (Line("lr"),)),
    Panel("Tokens per second", (Line("tokens_per_second"),)),
    Panel("Model FLOPs utilisation", (Line("mfu"),), percent=True),
    Panel("Peak memory, GB", (Line("memory_gb"),)),
    Panel("Ties", (Line("ties"),), percent=True),
)


@dataclass(frozen=True)
class Drawing:
    """A drawn panel.

    Attributes:
        svg: the figure, with ids unique in the page and without a size.
        summary: first and last value of each line as a sentence.
        key: title of each kind of line, and whether it is dashed.
        data: edges of the axes in SVG units (`left`, `right`, `top`, `bottom`), the steps `low`
            and `high` at the left and right edge, and `series` with `name`, `run`, `colour`, `x`,
            `y`, `dashed`, `points` (drawn as points), and `min` and `max` where several steps
            share a point.
    """

    name: str
    title: str
    svg: str
    summary: str
    key: list[dict[str, Any]]
    data: dict[str, Any]


def drawings(runs: Sequence[Run]) -> list[Drawing]:
    """Return every panel for which a run has data."""
    wanted = [
        (panel, [line for line in panel.lines if any(line.metric in run.series for run in runs)])
        for panel in PANELS
    ]
    wanted = [(panel, lines) for panel, lines in wanted if lines]
    count = sum(line.metric in run.series for _, lines in wanted for line in lines for run in runs)
    # Curves of several runs overlap: use fewer points, each the mean of more steps.
    most = MOST_POINTS if len(runs) == 1 else MOST_BESIDE_OTHERS
    points = int(np.clip(ALL_POINTS // max(count, 1), 24, most))
    return [
        _draw(f"panel{number}", panel, lines, runs, points)
        for number, (panel, lines) in enumerate(wanted, 1)
    ]


def thinned(steps: Floats, values: Floats, most: int) -> tuple[Floats, Floats, Floats, Floats]:
    """Return (steps, mean, minimum, maximum) of at most `most` groups of neighbouring points.

    The step of a group is its last one, so that the curve ends at the run's last step.
    """
    if len(steps) <= most:
        return steps, values, values, values
    starts = np.linspace(0, len(steps), most, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(steps)))
    ends = np.append(starts[1:], len(steps)) - 1
    return (
        steps[ends],
        np.add.reduceat(values, starts) / sizes,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def _draw(
    name: str, panel: Panel, lines: Sequence[Line], runs: Sequence[Run], points: int
) -> Drawing:
    # Imported here, because matplotlib takes half a second and only a report needs it.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure = Figure(figsize=(WIDTH, HEIGHT))
    canvas = FigureCanvasSVG(figure)
    axes = figure.add_axes((0.15, 0.16, 0.82, 0.78))
    series, words = [], []
    scale = 100 if panel.percent else 1
    for number, run in enumerate(runs):
        for line in lines:
            if line.metric not in run.series:
                continue
            colour = _mark(number % COLOURS)
            steps, mean, low, high = thinned(*run.series[line.metric], points)
            banded = len(runs) == 1 and low is not high
            if banded:
                axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(steps, mean, line.style, color=colour, linewidth=1.4, markersize=3)
            label = " ".join(filter(None, (run.label if len(runs) > 1 else "", line.title)))
            label = printable(label or panel.title)
            words.append(f"{label} from {mean[0] * scale:.4g} to {mean[-1] * scale:.4g}")
            found = {
                "name": label,
                "run": number,
                "colour": number % COLOURS,
                "dashed": "--" in line.style,
                "points": "o" in line.style,
                "x": [int(step) for step in steps],
                "y": _rounded(mean * scale),
            }
            bounds = {"min": _rounded(low * scale), "max": _rounded(high * scale)}
            series.append(found | (bounds if banded else {}))
    if panel.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _dress(axes)
    buffer = StringIO()
    canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    key = [{"title": line.title, "dashed": "--" in line.style} for line in lines if line.title]
    data = _position(axes) | {"unit": "%" if panel.percent else "", "series": series}
    return Drawing(name, panel.title, _inline(buffer.getvalue(), name), "; ".join(words), key, data)


def _position(axes: Any) -> dict[str, float]:
    """Return the edges of the axes in SVG units, and the steps at the left and right edge."""
    box = axes.get_position()
    low, high = axes.get_xlim()
    return {
        "left": round(box.x0 * WIDTH * 72, 2),
        "right": round(box.x1 * WIDTH * 72, 2),
        "top": round((1 - box.y1) * HEIGHT * 72, 2),
        "bottom": round((1 - box.y0) * HEIGHT * 72, 2),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


def _rounded(values: Floats) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _mark(colour: int) -> str:
    return f"#abc{colour:03x}"


def _dress(axes: Any) -> None:
    """Style axes: a grid behind the lines, no box, text in the page's colour."""
    axes.grid(True, color=MARK_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=MARK_INK, labelsize=8.5, length=0)
    axes.set_xlabel("step", color=MARK_INK, fontsize=8.5)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)


def _inline(svg: str, name: str) -> str:
    """Prepare an SVG for a page with several: unique ids, no size, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = svg.replace(MARK_INK, "var(--ink)").replace(MARK_GRID, "var(--grid)")
    for colour in range(COLOURS):
        svg = svg.replace(_mark(colour), f"var(--run{colour})")
    # The page labels the figure: hide its many groups from screen readers.
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
