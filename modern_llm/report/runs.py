"""What a run folder holds, read tolerantly: a run that was killed has a report too.

Files: `config.yaml`, `metrics.jsonl`, `outcome.json` and, where they stand, `summary.json` (data
and environment) and `samples.jsonl` (answers by step). Called by `page`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from modern_llm.config.regular_files import read_text

Floats = NDArray[np.float64]


class ReportError(ValueError):
    """A folder that no report can be made of; the command line gives it status 2."""

    status = 2


@dataclass
class Run:
    """One run.

    Attributes:
        label: short name that no other run of the page has.
        config: dotted option name -> value.
        series: metric -> (steps, values), both (n,), values finite, in the order of the steps.
        outcome: status, reason and last step; empty while the run goes on.
        summary: what the run noted of its data and its environment.
        samples: answers to fixed prompts, one object a step and prompt.
    """

    path: Path
    label: str
    config: dict[str, Any]
    series: dict[str, tuple[Floats, Floats]]
    outcome: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, None where it was never logged."""
        return float(self.series[name][1][-1]) if name in self.series else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every folder and give each run a label of its own.

    Raises:
        ReportError: a folder is no run folder, or one is named twice; all problems at once.
    """
    places = [folder.expanduser() for folder in folders]
    problems = [
        f"{place}: is no run folder (no metrics.jsonl in it); give the output_dir of a run"
        for place in places
        if not (place / "metrics.jsonl").is_file()
    ]
    whole = [place.resolve() for place in places]
    problems += [
        f"{place}: is named twice; name each run once"
        for at, place in enumerate(places)
        if whole[at] in whole[:at]
    ]
    if not places:
        problems.append("no run folder is named; give one or more")
    if problems:
        raise ReportError("; ".join(problems))
    runs = [_read(place) for place in places]
    _label(runs)
    return runs


def _read(place: Path) -> Run:
    config = flat(_yaml(place / "config.yaml"))
    name = str(config.get("train.run_name") or place.name)
    return Run(
        path=place,
        label=name,
        config=config,
        series=_series(_lines(place / "metrics.jsonl")),
        outcome=_json(place / "outcome.json"),
        summary=_json(place / "summary.json"),
        samples=_lines(place / "samples.jsonl"),
    )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a kill may have cut the last one."""
    try:
        text = read_text(path)
    except (OSError, ValueError):
        return []
    found = []
    for line in text.split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def _series(records: list[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    points: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and np.isfinite(value):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {
        name: (np.array(sorted(at), np.float64), np.array([at[s] for s in sorted(at)]))
        for name, at in points.items()
    }


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return option -> its value in each run, of the options in which they differ."""
    names = sorted({name for run in runs for name in run.config})
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {
        name: found
        for name, found in values.items()
        if len({json.dumps(value, default=str) for value in found}) > 1
    }


# They name a run and say nothing of it.
_NAMES = ("train.run_name", "train.output_dir")


def _label(runs: list[Run]) -> None:
    """Name runs by what distinguishes them: an option of a sweep, else the run's or folder's
    name."""
    told = {n: v for n, v in differences(runs).items() if n not in _NAMES}
    if len(runs) > 1 and 0 < len(told) <= 2:
        for at, run in enumerate(runs):
            run.label = ", ".join(f"{n.rpartition('.')[2]}={v[at]}" for n, v in told.items())
    for pick in (lambda run: run.path.name, lambda run: str(run.path)):
        if len({run.label for run in runs}) == len(runs):
            return
        for run in runs:
            run.label = pick(run)
