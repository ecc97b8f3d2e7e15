"""Run the audit, or some of it: python audit/run.py --trainer trl --check resume

Each cell is written to `audit/results/TRAINER-CHECK.json`; `audit/page.py` makes the page of them.
Runs in an environment with this package. The other trainers need theirs: see `environments.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trainers
from checks import NAMES as CHECKS
from environments import python_of
from frame import FAILS, HERE, NOT_HERE, Failed, Outcome, Skipped, Trainer, named

RESULTS = HERE / "results"


def cell(trainer: Trainer, check: str, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Run one check of one trainer."""
    start = time.monotonic()
    try:
        outcome = importlib.import_module(f"checks.{check}").run(trainer, folder)
    except Skipped as skipped:
        outcome = Outcome(skipped.verdict, str(skipped))
    except Failed as error:
        outcome = Outcome(FAILS, f"ended with an error: {error}")
    return {
        "trainer": trainer.name,
        "version": about["version"],
        "versions": about["versions"],
        "check": check,
        "verdict": outcome.verdict,
        "sentence": outcome.sentence,
        "figures": outcome.figures,
        "command": command(trainer.name, check),
        "seconds": round(time.monotonic() - start, 1),
    }


def command(name: str, check: str) -> str:
    """Return the command line of a cell."""
    model = " --model SMOLLM2" if check == "speed" else ""
    return f"python audit/run.py --trainer {name} --check {check}{model}"


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the JSON of a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['trainer']}-{result['check']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


def interpreter(name: str, environments: Path) -> Path | None:
    """Return the interpreter of a trainer, None if its environment was not made.

    This package runs in the environment of the audit where it has none of its own.
    """
    found = python_of(environments.resolve(), name)
    if found.exists():
        return found
    return Path(sys.executable) if name == "modern_llm" else None


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(trainers.NAMES)
    options.add_argument("--trainer", nargs="*", help=f"by default all: {names}")
    options.add_argument("--check", nargs="*", help=f"by default all: {', '.join(CHECKS)}")
    options.add_argument(
        "--environments", type=Path, default=HERE / "env", help="folder that environments.py filled"
    )
    options.add_argument("--results", type=Path, default=RESULTS, help="where the JSON is written")
    options.add_argument("--model", type=Path, help="a real model, for the check of speed")
    options.add_argument("--keep", type=Path, help="keep inputs, logs and runs in this folder")
    return options.parse_args()


def main() -> int:
    """Run the chosen cells; the status is 1 if a cell of this package fails."""
    given = arguments()
    status = 0
    named(given.check, CHECKS, "check")
    for name in named(given.trainer, trainers.NAMES, "trainer"):
        python = interpreter(name, given.environments)
        if python is None:
            print(
                f"{name}: skipped, {given.environments} has no environment of it: "
                f"python audit/environments.py {given.environments} {name}"
            )
            continue
        with tempfile.TemporaryDirectory(prefix="audit-") as place:
            root = (given.keep or Path(place)).resolve() / name
            status |= run_trainer(name, python, root, given)
    return status


def run_trainer(name: str, python: Path, root: Path, given: argparse.Namespace) -> int:
    """Run the chosen checks of one trainer."""
    status = 0
    about = Trainer(name, python, root / "about").call("about")
    for check in named(given.check, CHECKS, "check"):
        shutil.rmtree(root / check, ignore_errors=True)  # of a call before, under --keep
        trainer = Trainer(name, python, root / check / "calls", given.model)
        result = cell(trainer, check, root / check, about)
        write(result, given.results)
        print(f"{name:12} {check:16} {result['verdict']:16} {result['sentence']}", flush=True)
        status |= name == "modern_llm" and result["verdict"] in (FAILS, NOT_HERE)
    return status


if __name__ == "__main__":
    sys.exit(main())
