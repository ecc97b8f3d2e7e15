"""What a run folder holds, read tolerantly: a run that was killed has a report too.

Files: `config.yaml`, `metrics.jsonl`, `outcome.json` and, where they stand, `summary.json` (data
and environment) and `samples.jsonl` (answers by step). Called by `page`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from modern_llm.config.printable import one_line
from modern_llm.storage.untrusted import (
    LARGEST_LINES,
    LARGEST_SAMPLES,
    finite,
    json_lines,
    read_json,
    read_yaml,
    whole_number,
)

log = logging.getLogger(__name__)

METRICS = 1000
"""Most metrics that are read; a run logs a few dozen."""
POINTS = 1_000_000
"""Most values that are kept of a log: a drawing shows a few hundred of each metric."""
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
        if (place / "metrics.jsonl").is_symlink() or not (place / "metrics.jsonl").is_file()
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
        outcome=_outcome(_json(place / "outcome.json")),
        summary=_summary(_json(place / "summary.json")),
        samples=list(_lines(place / "samples.jsonl", LARGEST_SAMPLES)),
    )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path, follow=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _left_out(path, error)
    return _plain(found) if isinstance(found, dict) else _left_out(path, "is no mapping")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, follow=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _left_out(path, error)
    return found if isinstance(found, dict) else _left_out(path, "is no JSON object")


def _left_out(path: Path, why: object) -> dict[str, Any]:
    reason = getattr(why, "strerror", None) or one_line(why)[:200]
    log.warning("%s: cannot be read and is left out of the report (%s)", path, reason)
    return {}


def _plain(value: Any) -> Any:
    """Return nested values as JSON can say them: YAML also has dates, bytes, sets and odd keys."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _outcome(found: dict[str, Any]) -> dict[str, Any]:
    """Return status, reason and last step, each None where it is not what a run writes."""
    if not found:
        return {}
    return {
        "status": whole_number(found.get("status")),
        "reason": str(found.get("reason")),
        "last_step": whole_number(found.get("last_step")),
    }


_COUNTS = ("rows", "kept", "tokens", "prompts_cut", "responses_cut")


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return `data` and `environment` with the fields that the page and the card read."""
    data, environment = found.get("data"), found.get("environment")
    sources = [source for source in data if isinstance(source, dict)] if _is_list(data) else []
    return {
        "data": [_source(source) for source in sources],
        "environment": environment if isinstance(environment, dict) else {},
    }


def _source(found: dict[str, Any]) -> dict[str, Any]:
    formats, notes, means = (found.get(name) for name in ("formats", "notes", "mean_tokens"))
    return {
        "source": str(found.get("source")),
        "formats": [str(name) for name in formats] if isinstance(formats, dict | list) else [],
        "notes": [str(note) for note in notes] if _is_list(notes) else [],
        "drops": found.get("drops"),
        "mean_tokens": means if isinstance(means, dict) else {},
    } | {name: whole_number(found.get(name)) or 0 for name in _COUNTS}


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _lines(path: Path, most: int = LARGEST_LINES) -> Iterator[dict[str, Any]]:
    """Yield the objects with a step of a file of JSON lines."""
    damaged = 0
    try:
        for _, value in json_lines(path, most, follow=False):
            step = whole_number(value.get("step")) if isinstance(value, dict) else None
            damaged += step is None
            if step is not None:
                yield value | {"step": step}
    except FileNotFoundError:
        return
    except OSError as error:
        _left_out(path, error)
    if damaged:
        log.warning("%s: %d damaged lines are left out of the report", path, damaged)


def _series(records: Iterable[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """Return the points of every metric; of a log with very many, evenly spread ones.

    Memory is bounded: where all points together are too many, every second one of each metric is
    left out, and from then on only every second record is taken. The last value always stays.
    """
    points: dict[str, dict[int, float]] = {}
    last: dict[str, tuple[int, float]] = {}
    stride = count = 0
    for number, record in enumerate(records):
        for name, value in record.items():
            value = finite(value)
            if name == "step" or value is None or (name not in last and len(last) >= METRICS):
                continue
            last[name] = (record["step"], value)
            if number & stride == 0:
                known = points.setdefault(name, {})
                count += record["step"] not in known
                known[record["step"]] = value
        while count > POINTS:
            stride = 2 * stride + 1
            points = {name: dict(list(at.items())[::2]) for name, at in points.items()}
            count = sum(map(len, points.values()))
    for name, (step, value) in last.items():
        points.setdefault(name, {})[step] = value
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
