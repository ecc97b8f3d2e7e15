"""Draw `docs/concepts/architecture.svg`: `python docs/concepts/draw_architecture.py`.

Rows are layers; a row may import the rows below it. Numbers are the path of one pair, as
`docs/concepts/architecture.md` lists it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape


class Box(NamedTuple):
    """One folder of the package: its name, what it holds, the steps of a pair that happen in it."""

    name: str
    holds: str
    steps: str = ""
    wide: int = 1


ROWS: tuple[tuple[Box, ...], ...] = (
    (
        Box("cli", "one command"),
        Box("verbs", "one file per verb", wide=2),
        Box("demo", "all stages, small"),
    ),
    (
        Box("training", "loop, accumulation, optim, prefetch", "8 11", wide=2),
        Box("training/tasks", "a batch and its objective", "10"),
        Box("training/run", "folder, lock, outcome"),
        Box("training/checkpointing", "save, resume"),
        Box("training/guards", "what vetoes a step"),
        Box("training/monitoring", "metrics, trackers"),
    ),
    (
        Box("planning", "memory, launch line"),
        Box("inference", "generate, chat"),
        Box("evaluation", "score, compare"),
        Box("export", "final model"),
        Box("report", "one HTML page"),
    ),
    (
        Box("reference", "keys, scoring, the pass that fills the store", "4 7", wide=2),
        Box("reference/store", "log-probs on disk"),
    ),
    (Box("setup", "tokenizer, tables, policy and frozen scorers, micro-batches"),),
    (
        Box("data/read", "rows, formats", "1 2"),
        Box("data/encode", "template, token ids", "3"),
        Box("data/table", "memory-mapped ids", "3"),
        Box("data/batch", "prefix trees, plan", "5 6"),
        Box("data/inspect", "statistics"),
    ),
    (
        Box("models", "TokenScorer, fused head, capabilities", "9", wide=2),
        Box("distributed", "runtime, engine, collectives, health, shutdown", "8 11", wide=2),
        Box("objectives", "pure losses", "10"),
    ),
    (
        Box("storage", "atomic commits, manifests, leases", wide=2),
        Box("config", "typed sections", wide=1),
    ),
)
WIDTH, ROW, GAP, MARGIN = 1120, 72, 12, 16
STYLE = """
  .box { fill: #ffffff; stroke: #57606a; }
  .name { font: 600 14px ui-monospace, monospace; fill: #1f2328; }
  .holds { font: 12px system-ui, sans-serif; fill: #57606a; }
  .badge { fill: #0969da; }
  .step { font: 600 11px system-ui, sans-serif; fill: #ffffff; text-anchor: middle; }
  .ground { fill: #f6f8fa; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #161b22; stroke: #8b949e; }
    .name { fill: #e6edf3; }
    .holds { fill: #9198a1; }
    .badge { fill: #4493f8; }
    .step { fill: #0d1117; }
    .ground { fill: #0d1117; }
  }
"""


def draw() -> str:
    """Return the picture as SVG."""
    height = MARGIN * 2 + len(ROWS) * (ROW + GAP) - GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'aria-label="Layers of modern_llm and the path of one pair through them">',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{WIDTH}" height="{height}"/>',
    ]
    for number, row in enumerate(ROWS):
        units = sum(box.wide for box in row)
        unit = (WIDTH - 2 * MARGIN - GAP * (len(row) - 1)) / units
        left, top = float(MARGIN), MARGIN + number * (ROW + GAP)
        for box in row:
            parts += _box(box, left, top, unit * box.wide)
            left += unit * box.wide + GAP
    return "\n".join([*parts, "</svg>", ""])


def _box(box: Box, left: float, top: int, wide: float) -> list[str]:
    words, lines, room = box.holds.split(), [""], int((wide - 20) / 6.2)
    for word in words:
        if len(lines[-1]) + len(word) + 1 > room and lines[-1]:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    label = box.name.removeprefix("training") or box.name  # `/tasks` is right of `training`
    parts = [
        f'<rect class="box" x="{left:.0f}" y="{top}" width="{wide:.0f}" height="{ROW}" rx="6"/>',
        f'<text class="name" x="{left + 10:.0f}" y="{top + 22}">{escape(label)}</text>',
    ]
    for at, line in enumerate(lines):
        y = top + 42 + 16 * at
        parts.append(f'<text class="holds" x="{left + 10:.0f}" y="{y}">{escape(line)}</text>')
    for at, step in enumerate(reversed(box.steps.split())):
        x = left + wide - 16 - 24 * at
        parts.append(f'<circle class="badge" cx="{x:.0f}" cy="{top + ROW - 14}" r="10"/>')
        parts.append(f'<text class="step" x="{x:.0f}" y="{top + ROW - 10}">{step}</text>')
    return parts


if __name__ == "__main__":
    Path(__file__).with_name("architecture.svg").write_text(draw(), encoding="utf-8")
