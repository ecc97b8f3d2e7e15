"""From a configuration file and command-line overrides to checked sections, all problems at once.

A verb's settings are a pydantic-settings class whose fields are sections and single options.
`pydantic-settings` makes the options and the help text; the file is read with a safe YAML loader
(JSON is YAML). Creates nothing on disk.
"""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from modern_llm.config.errors import ConfigError
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.untrusted import LARGEST_YAML, parse_yaml

S = TypeVar("S", bound=BaseSettings)

_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")

SPELLINGS = {
    "--json": "--json_output",
    "--dry-run": "--dry_run",
    "--copy": "--copy_to",
    "--accept-change": "--accept_change",
    "--expect-world": "--expect_world",
}


class Settings(BaseSettings):
    """Base of every verb's settings: unknown names are refused, the environment is not read."""

    model_config = SettingsConfigDict(
        extra="forbid",
        env_prefix="MODERN_LLM_NOT_READ_FROM_THE_ENVIRONMENT_",
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_hide_none_type=True,
        cli_exit_on_error=False,
        cli_implicit_flags="toggle",
        protected_namespaces=(),
    )

    config_is_of_a_stage: ClassVar[bool] = False
    """Whether `--config` names the configuration of a run, which the verb reads itself."""

    config: Path | None = None
    """YAML or JSON file with the sections below; options on the command line override it."""
    json_output: bool = False
    """Also print the result as one JSON object, the last line on stdout (--json does the same)."""
    debug: bool = False
    """Show the traceback of an error."""
    expect_world: Annotated[int, Field(gt=0)] | None = None
    """Refuse to run on another number of processes than this (--expect-world does the same)."""


def read_settings(schema: type[S], arguments: list[str], verb: str) -> S:
    """Return the checked settings of one verb.

    Args:
        arguments: the command line after the verb.

    Raises:
        ConfigError: every unknown name, wrong type, illegal value and contradiction, with its
        place.
    """
    arguments = [_spelled(argument) for argument in arguments]
    given = _command_line(schema, arguments, verb)
    file = Path(given["config"]) if given.get("config") else None
    lines: dict[str, int] = {}
    values = given
    if file is not None and not schema.config_is_of_a_stage:
        content, lines = _read_file(file)
        values = _merged(content, given)
    return _checked(schema, values, given, file, lines)


def sections_of(path: Path) -> list[str]:
    """Return the names at the top of a configuration file.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    return list(_read_file(path)[0])


def _checked(
    schema: type[S],
    values: dict[str, Any],
    given: dict[str, Any],
    file: Path | None,
    lines: dict[str, int],
) -> S:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        known = {e["loc"]: e for e in error.errors(include_url=False)}
        problems = [_problem(schema, e, given, file, lines) for e in known.values()]
        raise ConfigError(problems) from error


def _spelled(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"{SPELLINGS.get(name, name)}{equals}{value}"


def _command_line(schema: type[BaseSettings], arguments: list[str], verb: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        prog=f"modern-llm {verb}",
        description=(schema.__doc__ or "").strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    source = CliSettingsSource(schema, cli_parse_args=False, root_parser=parser)
    try:
        parsed, unknown = parser.parse_known_args(arguments)
    except (argparse.ArgumentError, SettingsError) as error:
        raise ConfigError([f"command line: {error}; see modern-llm {verb} --help"]) from error
    if unknown:
        options = [o for action in parser._actions for o in action.option_strings]
        raise ConfigError(
            [
                f"command line: {word} is no option of {verb}{_close(word, options)}"
                for word in unknown
            ]
        )
    return source(parsed_args=parsed)()


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the content of a file and the line of every dotted key in it."""
    try:
        text = read_text(path, LARGEST_YAML, encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError([f"--config {path}: {error.strerror}; check the path"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"--config {path}: byte {error.start} is no UTF-8; save the file as UTF-8"]
        ) from error
    except ValueError as error:
        raise ConfigError([f"--config {path}: {error}; a configuration has fewer"]) from error
    try:
        content, root = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError([f"{path}{place}: not YAML or JSON: {reason}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}:1: must be a mapping of sections (train: ..., data: ...)"])
    lines: dict[str, int] = {}
    problems: list[str] = []
    _note_lines(root, "", lines, problems, set())
    if problems:
        raise ConfigError([f"{path}:{problem}" for problem in problems])
    return content, lines


def _note_lines(
    node: yaml.Node, prefix: str, lines: dict[str, int], problems: list[str], seen: set[int]
) -> None:
    """Note where each dotted key stands, and which stand twice or are no names.

    Args:
        seen: nodes that were looked at: a file of aliases may name one a billion times.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            _note_lines(value, f"{prefix}{at}.", lines, problems, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if key.tag not in _NAMES:
            problems.append(f"{line}: {name}: a name is text; quote it")
        elif name in lines:  # what stands in it is not to be named as well
            problems.append(f"{line}: {name} stands twice; keep one")
        else:
            lines[name] = line
            _note_lines(value, f"{name}.", lines, problems, seen)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` written over it, section by section."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return result


def _problem(
    schema: type[BaseSettings],
    error: Any,
    given: dict[str, Any],
    file: Path | None,
    lines: dict[str, int],
) -> str:
    """One problem as `place: option: what is wrong`."""
    path = [str(part) for part in error["loc"]]
    name = ".".join(path)
    place = _place(file, lines, path) if file is not None and not _holds(given, path) else ""
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}{name}: unknown option{_close(path[-1], _fields(schema, path[:-1]))}"
    if kind in ("missing", "missing_argument"):
        return f"{place}{name}: required; say it in the file or as --{name}"
    if kind == "value_error":
        return f"{place}{name}: {message}" if name else message
    shown = repr(error.get("input"))
    return f"{place}{name}: {message}, got {shown[:80]}"


def _place(file: Path, lines: dict[str, int], path: list[str]) -> str:
    """Where an option stands in the file; where it should: its section, or the whole file."""
    known = (".".join(path[:end]) for end in range(len(path), 0, -1))
    line = next((lines[name] for name in known if name in lines), 1)
    return f"{file}:{line}: "


def _holds(values: Any, path: list[str]) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _fields(schema: Any, path: list[str]) -> list[str]:
    """Names that may stand in the section at `path`."""
    for part in path:
        field = _field_types(schema).get(part)
        schema = next(
            (t for t in (field, *getattr(field, "__args__", ())) if _field_types(t)), None
        )
    return list(_field_types(schema))


def _field_types(schema: Any) -> dict[str, Any]:
    fields = (
        getattr(schema, "model_fields", None) or getattr(schema, "__pydantic_fields__", None) or {}
    )
    return {name: field.annotation for name, field in fields.items()}


def _close(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""
