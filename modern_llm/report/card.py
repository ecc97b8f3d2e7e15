"""The model card of a run: base model, data, results, configuration and versions.

Everything comes from the files of the run folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modern_llm.config.printable import one_line, printable
from modern_llm.report.runs import Run, read_runs
from modern_llm.report.values import HEADLINES, cell

_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/[\w.-]{1,96})?", re.ASCII)
STAGES = {"dpo": "sft_checkpoint", "kto": "sft_checkpoint", "sft": "pretrain_checkpoint"}
"""Stage -> the argument that names its start. A run of DPO or KTO has a section of that name."""


def model_card(folder: Path) -> str:
    """Return the card of the run in `folder`, with the Hub's metadata as front matter.

    Raises:
        ReportError: `folder` is not a run folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    (run,) = read_runs([folder])
    stage = _stage(run.config)
    mark = STAGES.get(stage)
    base = _hub_id(run.config.get(mark)) if mark else None
    data = ModelCardData(
        base_model=base,
        datasets=[name for name in _data_names(run) if _hub_id(name)] or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["modern-llm", stage],
        model_name=one_line(run.label),
    )
    text = "\n".join(_lines(run, stage, mark))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _stage(config: dict[str, Any]) -> str:
    """Return the stage of a run's configuration."""
    if any(name.partition(".")[0] == "kto" for name in config):
        return "kto"
    return next((stage for stage, mark in STAGES.items() if mark in config), "pretraining")


def _lines(run: Run, stage: str, mark: str | None) -> list[str]:
    lines = [f"# {words(run.label)}", "", f"Trained by modern-llm: {stage}, {_steps(run)}."]
    if mark:
        lines.append(f"It started from {code(run.config[mark])}.")
    lines += ["", "## Data", ""]
    for source in run.summary.get("data", []):
        formats = words(", ".join(source["formats"]))
        kept = f"{source['rows']:,} rows, {source['kept']:,} kept ({formats})"
        lines.append(f"- {code(source['source'])}: {kept}, {source['tokens']:,} tokens")
    if not run.summary.get("data"):
        lines += [f"- {code(name)}" for name in _data_names(run)] or ["not recorded"]
    lines += ["", "## Results", "", "| metric | last value |", "|---|---|"]
    for metric in HEADLINES:
        if (value := run.last(metric.name)) is not None:
            lines.append(f"| {metric.title} | {metric.text(value)} |")
    settings = [f"{n}: {cell(value)}" for n, value in run.config.items() if value is not None]
    lines += ["", "## Configuration", "", *block(settings, "yaml"), "", "## Versions", ""]
    environment = run.summary.get("environment", {})
    lines += [f"- {words(n)}: {words(cell(v))}" for n, v in environment.items()] or ["not recorded"]
    return lines


def words(text: object) -> str:
    """Return text escaped as one line of Markdown."""
    # A plus starts a list only at the start of a line.
    return re.sub(r"^\+|[\\`*_{}\[\]<>#!|~&$]", r"\\\g<0>", one_line(text))


def code(text: object) -> str:
    """Return text as an inline code span, with more backticks than any run of them in the text."""
    shown = one_line(text) or " "
    mark = "`" * (_longest_run(shown) + 1)
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{mark}{room}{shown}{room}{mark}"


def block(lines: Sequence[str], language: str) -> list[str]:
    """Return lines as a fenced block, with a fence longer than any in the lines."""
    shown = [printable(line) for line in lines]
    fence = "`" * max(3, _longest_run("\n".join(shown)) + 1)
    return [f"{fence}{language}", *shown, fence]


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _steps(run: Run) -> str:
    step = run.outcome.get("last_step")
    return f"{step:,} optimizer steps" if step is not None else "unfinished"


def _data_names(run: Run) -> list[str]:
    sources = run.config.get("data.sources") or []
    names = [
        str(source["dataset_name"])
        for source in (sources if isinstance(sources, list) else [])
        if isinstance(source, dict) and source.get("dataset_name")
    ]
    if not names and (name := run.config.get("data.dataset_name")):
        names = [str(name)]
    return names


def _hub_id(name: Any) -> str | None:
    """Return `name` if it may be a Hub id, None for a local path."""
    text = str(name or "")
    local = not text or Path(text).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".pt")
    local = local or not _HUB_ID.fullmatch(text) or Path(text).exists()
    return None if local else text
