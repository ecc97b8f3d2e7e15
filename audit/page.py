"""Generate `docs/audit.md` from `audit/results/*.json`: python audit/page.py [--check]"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from checks import NAMES as CHECKS
from environments import PACKAGES
from frame import HERE, HOLDS
from trainers import TITLES

RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "audit.md"
OPENING = HERE / "opening.md"
NOT_RUN = "not run"
Cells = dict[tuple[str, str], dict[str, Any]]


def read(folder: Path = RESULTS) -> Cells:
    """Return the results by trainer and check."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    return {(cell["trainer"], cell["check"]): cell for cell in found}


def shown(cells: Cells) -> list[str]:
    """Return the trainers of which anything is known, in the order of the environments."""
    return [name for name in PACKAGES if any(trainer == name for trainer, _ in cells)]


def verdict(cells: Cells, trainer: str, check: str) -> str:
    """Return the verdict of a cell; where nothing ran, that of the installation."""
    if (trainer, check) in cells:
        return cells[trainer, check]["verdict"]
    install = cells.get((trainer, "install"))
    if not install or install["verdict"] == HOLDS or check in install["figures"].get("not_for", ()):
        return NOT_RUN
    return install["verdict"]


def title(check: str) -> str:
    return importlib.import_module(f"checks.{check}").TITLE


def table(rows: list[list[str]]) -> list[str]:
    """Return a table; the first row is its head."""
    lines = ["| " + " | ".join(clean(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def clean(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def verdicts(cells: Cells, names: list[str]) -> list[str]:
    """Return the table of verdicts, one column a trainer."""
    rows = [["check", *(TITLES[name] for name in names)]]
    for check in CHECKS:
        rows.append([f"[{title(check)}](#{anchor(check)})"])
        rows[-1] += [verdict(cells, name, check) for name in names]
    return table(rows)


def anchor(check: str) -> str:
    kept = "".join(letter for letter in title(check).lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def versions(cells: Cells, names: list[str]) -> list[str]:
    """Return the table of versions and installations."""
    rows = [["trainer", "version", "with", "installation"]]
    for name in names:
        own = [cell for (trainer, _), cell in cells.items() if trainer == name]
        listed = next((cell["versions"] for cell in own if cell.get("versions")), {})
        install = cells.get((name, "install"), {})
        rows.append([TITLES[name], next((c["version"] for c in own if c["version"]), "-")])
        rows[-1].append(", ".join(f"{key} {value}" for key, value in listed.items()) or "-")
        rows[-1].append(install.get("sentence", "the environment that ran the audit"))
    return table(rows)


def section(cells: Cells, check: str) -> list[str]:
    """Return what a check asks, and what each trainer answered."""
    text = importlib.import_module(f"checks.{check}").__doc__.strip()
    lines = ["", f"## {title(check)}", "", text.partition("\n\n")[2].strip(), ""]
    found = [cells[name, check] for name in PACKAGES if (name, check) in cells]
    if not found:
        return [*lines, "Not run."]
    rows = [["trainer", "verdict", "measured", "command", "seconds"]]
    for cell in found:
        rows.append([TITLES[cell["trainer"]], cell["verdict"], cell["sentence"]])
        rows[-1] += [f"`{cell['command']}`", f"{cell['seconds']:.0f}"]
    return [*lines, *table(rows)]


def page(cells: Cells) -> str:
    """Return the text of the page."""
    names = shown(cells)
    lines = [
        OPENING.read_text("utf-8"),
        "## Verdicts",
        "",
        *verdicts(cells, names),
        "",
        "## Versions",
        "",
    ]
    lines += versions(cells, names)
    for check in CHECKS:
        lines += section(cells, check)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or compare it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="only compare; 1 if it differs")
    text = page(read())
    if options.parse_args().check:
        return int(PAGE.read_text("utf-8") != text)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
