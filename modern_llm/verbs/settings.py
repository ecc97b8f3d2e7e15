"""From a configuration file and command-line overrides to checked sections, all problems at once.

A verb's settings are a pydantic-settings class whose fields are sections and single options.
`pydantic-settings` makes the options and the help text; the file is read with a safe YAML loader
(JSON is YAML). Creates nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from modern_llm.config.errors import ConfigError, close_to
from modern_llm.config.foreign import meaning_here
from modern_llm.config.plugins import load_plugins
from modern_llm.storage.regular_files import read_text
from modern_llm.storage.untrusted import LARGEST_YAML, parse_yaml
from modern_llm.verbs.command_line import read_words

S = TypeVar("S", bound=BaseSettings)
T = TypeVar("T")

_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


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
        cli_shortcuts={"json_output": "json", "copy_to": "copy"},
        protected_namespaces=(),
    )

    config_is_of_a_stage: ClassVar[bool] = False
    """Whether `--config` names the configuration of a run, which the verb reads itself."""
    example: ClassVar[str]
    """One command line of the verb, for its help."""
    often: ClassVar[frozenset[str]] = frozenset()
    """Options of sections that `--help` lists, the others only `--help all`; empty lists all."""

    @classmethod
    def variant(cls, arguments: list[str]) -> type[Settings]:
        """Return the class that reads a command line: itself, or one for another stage."""
        return cls

    config: Path | None = None
    """Configuration file (YAML or JSON), also given as a word alone; options on the command line
    override it."""
    json_output: bool = False
    """Also print the result as one JSON object, the last line on stdout."""
    debug: bool = False
    """Show the traceback of an error."""
    expect_world: Annotated[int, Field(gt=0)] | None = None
    """Refuse to run on another number of processes than this."""


def read_settings(schema: type[S], arguments: list[str], verb: str) -> S:
    """Return the checked settings of one verb.

    Args:
        arguments: the command line after the verb.

    Raises:
        ConfigError: every unknown name, wrong type, illegal value and contradiction, with its
        place.
    """
    given = read_words(schema, arguments, verb)
    if given.get("config") == "":
        raise ConfigError(["command line: --config: is empty; name a file"])
    file = Path(given["config"]) if given.get("config") else None
    lines: dict[str, int] = {}
    values = given
    if file is not None and not schema.config_is_of_a_stage:
        content, lines = _read_file(file)
        values = _merged(content, given)
    if "plugins" in schema.model_fields:
        load_plugins(_plugins_of(values.get("plugins")))
    return _checked(schema, values, given, file, lines)


def _plugins_of(value: Any) -> list[Any]:
    """Return the modules of the option `plugins`; a value of another type is refused later."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list) else []


def check_values(schema: type[S], values: dict[str, Any]) -> S:
    """Return the checked settings of nested values, as `read_settings` of a file with them.

    Raises:
        ConfigError: every problem of them.
    """
    return _checked(schema, values, {}, None, {})


def build_section(make: Callable[..., T], **values: Any) -> T:
    """Return the section that `make` builds; what it refuses becomes one error of this package."""
    try:
        return make(**values)
    except ValueError as error:
        raise ConfigError([reason_of(error)]) from error


def reason_of(error: ValueError) -> str:
    """Return what pydantic or a check of ours says, without pydantic's frame."""
    found = getattr(error, "errors", None)
    if found is None:
        return str(error)
    return "; ".join(entry["msg"].removeprefix("Value error, ") for entry in found())


def option_names(schema: type[BaseSettings]) -> set[str]:
    """Return every option of a verb, those of its sections as `SECTION.NAME`."""
    names = set()
    for name in _fields(schema, []):
        inner = _fields(schema, [name])
        names |= {name, *(f"{name}.{option}" for option in inner)}
    return names


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
        known: dict[tuple[str, ...], list[Any]] = {}
        for found in error.errors(include_url=False):
            known.setdefault(_option_path(values, found), []).append(found)
        problems = [
            _problem(schema, list(path), found, _place(given, file, lines, list(path)))
            for path, found in known.items()
        ]
        raise ConfigError(problems) from error


def _option_path(values: Any, error: Any) -> tuple[str, ...]:
    """Return the path of an option in the values, without the types that pydantic tried there."""
    path: list[str] = []
    for part in error["loc"]:
        if isinstance(values, dict) and part in values:
            values = values[part]
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not error["type"].startswith(("missing", "extra", "unexpected")):
            continue
        path.append(str(part))
    return tuple(path)


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
    """Note the line of each dotted key, and which keys are doubled or are not names.

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
        elif name in lines:  # its content is not named as well
            problems.append(f"{line}: {name} is there twice; keep one")
        else:
            lines[name] = line
            _note_lines(value, f"{name}.", lines, problems, seen)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `below` with the values of `above` written over it, section by section.

    A word where `below` should have a section stays: the check of the section refuses it.
    """
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        if isinstance(value, dict) and old is not None:
            result[name] = _merged(old, value) if isinstance(old, dict) else old
        else:
            result[name] = value
    return result


def _problem(schema: type[BaseSettings], path: list[str], errors: list[Any], place: str) -> str:
    """One problem as `place: option: what is wrong`.

    Args:
        errors: of one option; several where its type is a union.
    """
    name, error = ".".join(path), errors[0]
    kind = error["type"]
    message = " or ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in errors))
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        hint = meaning_here(path[-1], option_names(schema))
        return (
            f"{place}{name}: unknown option{hint or close_to(path[-1], _fields(schema, path[:-1]))}"
        )
    if kind in ("missing", "missing_argument"):
        option = f"{name}.OPTION" if _fields(schema, path) else name
        return f"{place}{name}: required; set it in a configuration file or as --{option}"
    if kind == "value_error":
        return f"{place}{name}: {message}" if name else message
    shown = repr(error.get("input"))
    return f"{place}{name}: {message}, got {shown[:80]}"


def _place(given: dict[str, Any], file: Path | None, lines: dict[str, int], path: list[str]) -> str:
    """Where a value is: the command line, a line of the file, or both for a section of both.

    Of a missing option: its section in the file, or the file's first line.
    """
    if not path:
        return ""
    known = (".".join(path[:end]) for end in range(len(path), 0, -1))
    line = next((lines[name] for name in known if name in lines), None)
    value: Any = given
    for part in path:
        if not isinstance(value, dict):
            break  # a part of one option's value
        if part not in value:
            return f"{file}:{line or 1}: " if file is not None else ""
        value = value[part]
    if isinstance(value, dict) and line is not None:
        return f"{file}:{line} and command line: "
    return "command line: "


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
