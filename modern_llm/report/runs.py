"""Reading of run folders for reports. It tolerates missing and damaged files of a killed run.

Files: `config.yaml`, `metrics.jsonl`, `outcome.json` and, if they exist, `summary.json` (data and
environment), `samples.jsonl` (answers by step) and `warnings.jsonl`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from modern_llm.config.printable import one_line
from modern_llm.storage.untrusted import (
    LARGEST,
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
"""Maximum number of metrics that are read; a run logs a few dozen."""
POINTS = 1_000_000
"""Maximum number of values that are kept; a drawing shows a few hundred of each metric."""
WARNINGS = 100
"""Maximum number of warnings that are read; a run writes no more."""
Floats = NDArray[np.float64]


class ReportError(ValueError):
    """A folder cannot be reported; exit status 2."""

    status = 2


@dataclass
class Run:
    """One run.

    Attributes:
        label: short name, unique in the page.
        config: dotted option name -> value.
        series: metric -> (steps, values), both (n,), finite, sorted by step.
        outcome: status, reason and last step; empty while the run is active.
        summary: statistics of the data, environment, and names of the options that differ from
            their defaults (`changed`, None in runs of earlier versions).
        samples: answers to fixed prompts, one object per step and prompt.
        warnings: what the run warned of, each with `step`, `text` and `advice`.
    """

    path: Path
    label: str
    config: dict[str, Any]
    series: dict[str, tuple[Floats, Floats]]
    outcome: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, None if it was never logged."""
        return float(self.series[name][1][-1]) if name in self.series else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the runs and give each a unique label.

    Raises:
        ReportError: a folder is not a run folder, or is named twice; all problems at once.
    """
    paths = [folder.expanduser() for folder in folders]
    problems = [
        f"{path}: is not a run folder (no metrics.jsonl in it); give the output_dir of a run"
        for path in paths
        if (path / "metrics.jsonl").is_symlink() or not (path / "metrics.jsonl").is_file()
    ]
    whole = [path.resolve() for path in paths]
    problems += [
        f"{path}: is named twice; name each run once"
        for at, path in enumerate(paths)
        if whole[at] in whole[:at]
    ]
    if not paths:
        problems.append("no run folder is named; give one or more")
    if problems:
        raise ReportError("; ".join(problems))
    runs = [_read(path) for path in paths]
    _label(runs)
    return runs


def _read(folder: Path) -> Run:
    config = flat(_yaml(folder / "config.yaml"))
    name = str(config.get("train.run_name") or folder.name)
    return Run(
        path=folder,
        label=name,
        config=config,
        series=_series(_lines(folder / "metrics.jsonl")),
        outcome=_outcome(_json(folder / "outcome.json")),
        summary=_summary(_json(folder / "summary.json")),
        samples=list(_lines(folder / "samples.jsonl", LARGEST_SAMPLES)),
        warnings=_warnings(folder / "warnings.jsonl"),
    )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = read_yaml(path, follow=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        return _skip(path, error)
    return _plain(found) if isinstance(found, dict) else _skip(path, "is not a mapping")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path, follow=False)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return _skip(path, error)
    return found if isinstance(found, dict) else _skip(path, "is not a JSON object")


def _skip(path: Path, why: object) -> dict[str, Any]:
    reason = getattr(why, "strerror", None) or one_line(why)[:200]
    log.warning("%s: cannot be read and is not in the report (%s)", path, reason)
    return {}


def _plain(value: Any) -> Any:
    """Return nested values as JSON types: YAML also has dates, bytes, sets and other keys."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _outcome(found: dict[str, Any]) -> dict[str, Any]:
    """Return status, reason and last step; a number of the wrong type becomes None."""
    if not found:
        return {}
    return {
        "status": whole_number(found.get("status")),
        "reason": str(found.get("reason")),
        "last_step": whole_number(found.get("last_step")),
    }


def _warnings(path: Path) -> list[dict[str, Any]]:
    """Return the warnings of a run, without damaged ones."""
    return [
        {"step": found["step"], "text": found["text"], "advice": str(found.get("advice") or "")}
        for found in islice(_lines(path, LARGEST), WARNINGS)
        if isinstance(found.get("text"), str)
    ]


_COUNTS = ("rows", "kept", "tokens", "prompts_cut", "responses_cut")


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return `data`, `environment` and `changed` with the fields that page and card need."""
    data, environment, changed = map(found.get, ("data", "environment", "changed"))
    sources = [source for source in data if isinstance(source, dict)] if _is_list(data) else []
    return {
        "data": [_source(source) for source in sources],
        "environment": environment if isinstance(environment, dict) else {},
        "changed": {str(name) for name in changed} if _is_list(changed) else None,
    }


def _source(found: dict[str, Any]) -> dict[str, Any]:
    formats, notes, means = (found.get(name) for name in ("formats", "notes", "mean_tokens"))
    drops = found.get("drops") if isinstance(found.get("drops"), dict) else {}
    return {
        "source": str(found.get("source")),
        "formats": [str(name) for name in formats] if isinstance(formats, dict | list) else [],
        "notes": [str(note) for note in notes] if _is_list(notes) else [],
        "drops": {name: count for name in drops if (count := whole_number(drops[name]))},
        "mean_tokens": means if isinstance(means, dict) else {},
    } | {name: whole_number(found.get(name)) or 0 for name in _COUNTS}


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _lines(path: Path, most: int = LARGEST_LINES) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file that have a step."""
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
        _skip(path, error)
    if damaged:
        log.warning("%s: %d damaged lines are not in the report", path, damaged)


def _series(records: Iterable[dict[str, Any]]) -> dict[str, tuple[Floats, Floats]]:
    """Return the points of every metric, thinned evenly if there are more than `POINTS`.

    To bound memory, every second point of each metric is then dropped, and later only every second
    record is read. The last value is always kept.
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


# Options that differ between any two runs.
_NAMES = ("train.run_name", "train.output_dir")


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return option -> its value in each run, for the options that differ, names of runs aside."""
    names = sorted({name for run in runs for name in run.config if name not in _NAMES})
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {
        name: found
        for name, found in values.items()
        if len({json.dumps(value, default=str) for value in found}) > 1
    }


def _label(runs: list[Run]) -> None:
    """Label runs by one or two options that differ (a sweep), else by run, folder or path name."""
    differing = differences(runs)
    if len(runs) > 1 and 0 < len(differing) <= 2:
        for at, run in enumerate(runs):
            run.label = ", ".join(f"{n.rpartition('.')[2]}={v[at]}" for n, v in differing.items())
    for pick in (lambda run: run.path.name, lambda run: str(run.path)):
        if len({run.label for run in runs}) == len(runs):
            return
        for run in runs:
            run.label = pick(run)
