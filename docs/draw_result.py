"""Draw curves of a finished run as one SVG: `python docs/draw_result.py RUN OUT.svg`.

The panels are those of the run's report. `docs/result.svg` is the run of `examples/real_model`:
`python docs/draw_result.py runs/one-sentence/run docs/result.svg`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from modern_llm.report.figures import Drawing, drawings
from modern_llm.report.runs import read_runs

SHOWN = ("Loss", "Rewards", "Reward margin")
WIDTH, HEIGHT, TOP = 331.2, 194.4, 40
STYLE = """
svg { --paper: #fff; --ink: #24272b; --grid: #e3e5e8; --run0: #0b62c4; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #15181c; --ink: #e7e9ec; --grid: #30363d; --run0: #7cb7ff; }
}
rect.paper { fill: var(--paper); }
text.title { font: 600 13px system-ui, sans-serif; fill: var(--ink); }
text.key { font: 11px system-ui, sans-serif; fill: var(--ink); }
"""


def draw(run: Path) -> str:
    """Return the panels side by side, in light and dark colours."""
    found = {drawing.title: drawing for drawing in drawings(read_runs([run]))}
    parts = [_panel(found[title], at) for at, title in enumerate(SHOWN)]
    width = WIDTH * len(SHOWN)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width:.1f} {HEIGHT + TOP}" role="img">\n<style>{STYLE}</style>\n'
        '<rect class="paper" width="100%" height="100%" rx="6"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(drawing: Drawing, at: int) -> str:
    left = at * WIDTH
    keys = " · ".join(
        f"{'●' if line['points'] else '┄' if number else '—'} {line['name']}"
        for number, line in enumerate(drawing.data["series"])
    )
    svg = drawing.svg.replace(
        "<svg ", f'<svg x="{left:.1f}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" ', 1
    )
    return (
        f'<text class="title" x="{left + 12:.1f}" y="16">{drawing.title}</text>'
        f'<text class="key" x="{left + 12:.1f}" y="33">{keys}</text>\n{svg}'
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(Path(sys.argv[1])), encoding="utf-8")
