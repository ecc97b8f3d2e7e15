"""`--sweep`: the same stage once for every value of one option or several, and one report of all.

Reference values are kept by content, so that a sweep over beta or learning rate scores once.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from modern_llm.config.errors import ConfigError, NotFiniteError
from modern_llm.verbs.settings import reason_of
from modern_llm.verbs.stage_settings import TrainingSettings
from modern_llm.verbs.terminal import show_ranking

log = logging.getLogger(__name__)


def run_sweep(settings: TrainingSettings, run: Callable[..., Path]) -> dict[str, Any]:
    """Run every point of the grid one after another; finished ones are skipped.

    The report is written after each run.

    A run whose loss is not finite does not end the others; its error is raised after the report.

    Returns:
        `runs` (folder and final model of each), `report`, and `ranking`: the table of the runs,
        the best first, as on the page.
    """
    points = grid(settings)
    log.info("sweep: %d runs in %s", len(points), settings.train.output_dir)
    failure: NotFiniteError | None = None
    results, page = [], None
    for number, (name, point) in enumerate(points, 1):
        log.info("sweep %d/%d: %s", number, len(points), name)
        folder = str(point.train.output_dir)
        try:
            results.append({"run": folder, "final": str(run(point))})
        except NotFiniteError as error:
            failure = failure or error
            results.append({"run": folder, "error": str(error)})
        page = _report([Path(result["run"]) for result in results], settings.train.output_dir)
    if page is not None:
        log.info("report of the sweep: %s", page)
    table = _ranking([Path(result["run"]) for result in results])
    if table is not None and not settings.json_output:
        show_ranking(table)
    if failure is not None:
        raise failure
    return {"runs": results, "report": page, "ranking": table}


def _report(folders: list[Path], place: Path) -> str | None:
    from modern_llm.report.page import write_report

    folders = _with_metrics(folders)
    return write_report(folders, place / "report.html")["report"] if folders else None


def _ranking(folders: list[Path]) -> dict[str, Any] | None:
    from modern_llm.report.runs import read_runs
    from modern_llm.report.values import ranking

    folders = _with_metrics(folders)
    return ranking(read_runs(folders)) if len(folders) > 1 else None


def _with_metrics(folders: list[Path]) -> list[Path]:
    """Return the runs that logged something; none on other processes than the first."""
    if os.environ.get("RANK", "0") != "0":
        return []
    return [folder for folder in folders if (folder / "metrics.jsonl").is_file()]


def grid(settings: TrainingSettings) -> list[tuple[str, TrainingSettings]]:
    """Return a name and settings for every combination of values.

    Raises:
        ConfigError: the text is no sweep, an option does not exist, or a value is refused; all of
        them at once.
    """
    axes, problems = _axes(settings.sweep or ""), []
    points = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = "_".join(f"{option.rpartition('.')[2]}-{value}" for option, value in chosen.items())
        try:
            points.append((name, _with(settings, chosen, name)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return points


def _axes(text: str) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for word in text.split():
        option, mark, values = word.partition("=")
        found = [yaml.safe_load(value) for value in values.split(",") if value]
        if not mark or not found or "." not in option:
            raise ConfigError(
                [f"sweep: {word!r} is not SECTION.OPTION=VALUE,VALUE,... (dpo.beta=0.05,0.1)"]
            )
        if option in axes or len(set(map(str, found))) < len(found):
            raise ConfigError([f"sweep: {word!r}: an option or a value is there twice; keep one"])
        axes[option] = found
    if not axes:
        raise ConfigError(["sweep: names no option; say e.g. dpo.beta=0.05,0.1"])
    return axes


def _with(settings: TrainingSettings, chosen: dict[str, Any], name: str) -> TrainingSettings:
    """The settings with these values, in a folder of their own."""
    changes: dict[str, dict[str, Any]] = {}
    for option, value in chosen.items():
        section, _, field = option.partition(".")
        known = {f.name for f in _fields(settings, section)}
        if field not in known:
            raise ConfigError([f"sweep: {option} is no option of this stage"])
        if (section, field) in (("train", "output_dir"), ("train", "run_name")):
            raise ConfigError([f"sweep: {option} is set by the sweep itself; leave it out"])
        changes.setdefault(section, {})[field] = value
    place = Path(settings.train.output_dir) / name
    changes["train"] = changes.get("train", {}) | {"output_dir": place}
    updated = {}
    for section, values in changes.items():
        try:
            updated[section] = dataclasses.replace(getattr(settings, section), **values)
        except ValueError as error:
            shown = ", ".join(f"{section}.{k}={v}" for k, v in values.items() if k != "output_dir")
            raise ConfigError([f"sweep: {shown}: {reason_of(error)}"]) from error
    return settings.model_copy(update=updated | {"sweep": None})


def _fields(settings: TrainingSettings, section: str) -> tuple[dataclasses.Field, ...]:
    found = getattr(settings, section, None)
    return dataclasses.fields(found) if dataclasses.is_dataclass(found) else ()
