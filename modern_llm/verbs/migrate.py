"""The verb `migrate`: a configuration of TRL, Axolotl or LLaMA-Factory becomes one of ours.

Every option of the file is printed in one of six groups, so that none is dropped silently. The
result passes the check that a run makes of its configuration before it loads anything.
"""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from modern_llm.config.errors import ConfigError
from modern_llm.config.foreign import TOOLS, trl
from modern_llm.config.foreign.rows import Row, Tool
from modern_llm.config.printable import one_line
from modern_llm.storage.atomic import write_file
from modern_llm.verbs.migration.read import Foreign, read_foreign, stage_of, tool_of
from modern_llm.verbs.migration.request import NoEquivalent, Off, Request, truth
from modern_llm.verbs.migration.rules import translate
from modern_llm.verbs.settings import Settings, check_values, option_names
from modern_llm.verbs.stages import STAGES

GROUPS = {
    "became": "became",
    "differs": "has another meaning here",
    "default": "default of {tool}, set because it differs here",
    "none": "has no equivalent",
    "unread": "could not be read: not a literal in the script",
    "not needed": "needs no option here",
    "off": "is off in the file",
}
SHAPE = {"vocab_size": 32000, "d_model": 512, "n_layers": 8, "n_heads": 8}
"""Model of a pretraining run, which other trainers take from a checkpoint."""


class MigrateSettings(Settings):
    """Turn a configuration of TRL, Axolotl or LLaMA-Factory into one of this package."""

    config_is_of_a_stage: ClassVar[bool] = True
    example: ClassVar[str] = "modern-llm migrate axolotl.yaml --output run.yaml"

    output: Path | None = None
    """The YAML file to write; by default it is printed."""
    tool: Literal["TRL", "Axolotl", "LLaMA-Factory"] | None = None
    """The trainer, where the options fit several."""
    stage: Literal["pretrain", "sft", "dpo", "kto"] | None = None
    """The stage, where the file does not say it."""
    processes: Annotated[int, Field(gt=0)] = 1
    """Processes (GPUs) of the run there: a batch is counted for one of them there, for all here."""
    model: str | None = None
    """The model to start from, where the file names none."""
    data: str | None = None
    """The data, in place of what the file names: Hub id, file or folder."""
    force: bool = False
    """Overwrite the file that --output names."""


@dataclass
class Line:
    """What one option of the file became."""

    option: str
    value: Any
    group: str
    ours: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def migrate(settings: MigrateSettings) -> dict[str, Any]:
    """Translate the file, print what each option became, and write the result."""
    if settings.config is None:
        raise ConfigError(["migrate needs a file: modern-llm migrate FILE"])
    if settings.output is not None and settings.output.exists() and not settings.force:
        raise ConfigError([f"--output {settings.output}: exists; name another, or add --force"])
    foreign = read_foreign(settings.config)
    named = next((tool for tool in TOOLS if tool.name == settings.tool), None)
    tool = named or tool_of(foreign, settings.config)
    stage = settings.stage or stage_of(tool, foreign, settings.config)
    lines = translated(tool, stage, foreign, settings.processes)
    result, added = assembled(stage, lines, settings)
    schema = next(each.settings for each in STAGES if each.name == stage)
    if not settings.json_output:
        show(tool, stage, settings.config, lines, added)
    try:
        check_values(schema, result)
    except ConfigError as error:
        problems = [f"the result is refused: {problem}" for problem in error.problems]
        raise ConfigError(problems) from error
    text = yaml.safe_dump(result, sort_keys=False, allow_unicode=True)
    if settings.output is not None:
        write_file(settings.output, text)
    if not settings.json_output:
        print(f"\nwritten: {settings.output}" if settings.output else f"\n{text}", end="")
        print(f"\ncheck it: modern-llm {stage} {settings.output or 'run.yaml'} --dry-run")
    return {
        "tool": tool.name,
        "stage": stage,
        "options": [vars(line) for line in lines],
        "added": added,
        "configuration": result,
        "output": str(settings.output) if settings.output else None,
    }


def translated(tool: Tool, stage: str, foreign: Foreign, processes: int) -> list[Line]:
    """Return a line for every option of the file, and for every default that differs here."""
    defaults = dict(tool.defaults)
    if tool.name == "TRL":
        defaults |= trl.STAGE_DEFAULTS.get(stage, {})
    given = {name: value for name, value in foreign.values.items() if value is not None}
    if tool.name == "LLaMA-Factory":  # there alpha follows the rank
        defaults["lora_alpha"] = 2 * given.get("lora_rank", defaults["lora_rank"])
    request = Request(tool.name, stage, defaults | given, frozenset(given), processes)
    lines = [_line(request, tool, name, value) for name, value in foreign.values.items()]
    lines += [Line(name, text, "unread") for name, text in foreign.unread.items()]
    for name, value in defaults.items():
        if name not in given and name not in foreign.unread:
            line = _line(request, tool, name, value)
            if line.ours:
                line.group = "default"
                lines.append(line)
    return lines


def _line(request: Request, tool: Tool, name: str, value: Any) -> Line:
    row = tool.rows.get(name)
    if value is None:
        return Line(name, value, "off")
    if row is None:
        return _without_row(tool, name, value)
    try:
        found = translate(request, name, value, row.rule, row.target(request.stage))
    except Off as reason:
        return Line(name, value, "off", note=str(reason).removeprefix("off"))
    except NoEquivalent as reason:
        return Line(name, value, "none", note=str(reason))
    known = option_names(next(s.settings for s in STAGES if s.name == request.stage))
    missing = [option for option in found.values if option not in known]
    if missing:
        return Line(name, value, "none", note=f"{request.stage} has no option {missing[0]}")
    note = "; ".join(filter(None, (_note(row, request.stage), found.note)))
    return Line(name, value, "differs" if note else "became", found.values, note)


def _note(row: Row, stage: str) -> str:
    if stage == "pretrain" and row.target(stage) == "train.tokenizer_name":
        return "pretrain makes a new model: of the old one the tokenizer is used"
    return row.note


def _without_row(tool: Tool, name: str, value: Any) -> Line:
    group = tool.group(name)
    if group == "not needed":
        return Line(name, value, "not needed", note=tool.reason(name))
    if value in (False, "", [], {}, 0) and not truth(value):
        return Line(name, value, "off")
    reason = tool.reason(name) if group else f"no option of {tool.name} that is known here"
    return Line(name, value, "none", note=reason)


def assembled(
    stage: str, lines: list[Line], settings: MigrateSettings
) -> tuple[dict[str, Any], list[str]]:
    """Return the configuration that the lines set, and what was added to it."""
    flat: dict[str, Any] = {}
    for line in sorted(lines, key=lambda line: line.group == "default", reverse=True):
        for name, value in line.ours.items():
            if name == "train.trackers" and name in flat:
                value = list(dict.fromkeys([*flat[name], *value]))
            flat[name] = value
    added = []
    starts = {"dpo": "sft_checkpoint", "kto": "sft_checkpoint", "sft": "pretrain_checkpoint"}
    checkpoint = starts.get(stage)
    if checkpoint:
        flat[checkpoint] = settings.model or flat.get(checkpoint)
        if flat[checkpoint] is None:
            raise ConfigError([f"{settings.config}: names no model: add --model ID_OR_FOLDER"])
    if settings.data:
        flat = {name: value for name, value in flat.items() if name not in ("data.sources",)}
        flat["data.dataset_name"] = settings.data
    if "train.warmup_steps" in flat:
        flat.pop("train.warmup_ratio", None)
    folder = flat.setdefault("train.output_dir", f"runs/{stage}")
    if "train.run_name" not in flat:
        flat["train.run_name"] = stage
        added.append(f"train.run_name: {stage} (names the final folder in {folder})")
    if stage == "pretrain":
        flat |= {f"model.{name}": value for name, value in SHAPE.items()} | {
            name: value for name, value in flat.items() if name.startswith("model.")
        }
        added.append("model: an example of a shape; set yours (vocab_size: the tokenizer's)")
    if not {"data.dataset_name", "data.sources"} & set(flat):
        added.append("the file names no data: give it with --data, here or in the run")
    return _nested(flat, checkpoint), added


def _nested(flat: dict[str, Any], checkpoint: str | None) -> dict[str, Any]:
    """Return sections; the checkpoint first, then the sections in the order of a path."""
    result: dict[str, Any] = {checkpoint: flat[checkpoint]} if checkpoint else {}
    for section in ("tokenizer_name", "train", "data", "dpo", "kto", "lora", "model"):
        inner = {
            name.partition(".")[2]: value
            for name, value in flat.items()
            if name.startswith(f"{section}.")
        }
        if inner or section in flat:
            result[section] = inner or flat[section]
    return result


def show(tool: Tool, stage: str, path: Path, lines: list[Line], added: list[str]) -> None:
    """Print every line in its group, fitted to the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    print(one_line(f"{path}: a configuration of {tool.name} for {stage}"))
    for group, title in GROUPS.items():
        found = [line for line in lines if line.group == group]
        texts = [_shown(line) for line in found if line.value is not None]
        if unset := [line.option for line in found if line.value is None]:
            texts.append(f"without a value: {', '.join(unset)}")
        _show_group(title.format(tool=tool.name), texts, width)
    _show_group("added", [one_line(text) for text in added], width)


def _show_group(title: str, texts: list[str], width: int) -> None:
    if texts:
        print(f"\n{title}")
    for text in texts:
        print(textwrap.fill(text, width, initial_indent="  ", subsequent_indent="      "))


def _shown(line: Line) -> str:
    ours = ", ".join(f"{name}: {_short(value)}" for name, value in line.ours.items())
    text = f"{line.option}: {_short(line.value)}"
    text += f" -> {ours}" if ours else ""
    return one_line(f"{text} ({line.note})" if line.note else text)


def _short(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
