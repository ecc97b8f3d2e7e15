"""From the words of a command line to nested values; `pydantic-settings` makes the options.

Values are text here: the sections check them, together with those of a configuration file.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any, NoReturn

from pydantic_settings import BaseSettings, CliSettingsSource
from pydantic_settings.exceptions import SettingsError

from modern_llm.config.errors import ConfigError, close_to
from modern_llm.config.foreign import meaning_here
from modern_llm.verbs.help_text import help_text

LONG_FORMS = {
    "train.tokenizer_name": "tokenizer_name",
    "train.resume": "resume",
    "train.accept_change": "accept_change",
    "train.profile_steps": "profile",
}
"""Options of a file that have a short form on the command line: accepted, not shown in help."""

CONFIGURATIONS = (".yaml", ".yml", ".json")


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit, `exit_on_error=False` or not."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


def add_options(
    parser: argparse.ArgumentParser, schema: type[BaseSettings]
) -> CliSettingsSource[Any]:
    """Add the options of a verb to a parser, and return what turns parsed words into values."""
    source: CliSettingsSource[Any] = CliSettingsSource(
        schema, cli_parse_args=False, root_parser=parser
    )
    known = {action.dest for action in parser._actions}
    for action in parser._actions:
        if LONG_FORMS.get(action.dest) in known:
            action.help = argparse.SUPPRESS
    return source


def read_words(schema: type[BaseSettings], words: list[str], verb: str) -> dict[str, Any]:
    """Return the values that the words after a verb name, sections as nested dictionaries.

    Raises:
        ConfigError: every word that is no option, or a value that cannot be read.
        SystemExit: the words contain `--help`; it was printed.
    """
    parser = _Parser(prog=f"modern-llm {verb}", allow_abbrev=False, exit_on_error=False)
    source = add_options(parser, schema)
    if (shown := _help(words)) is not None:
        print(help_text(parser, schema, everything=shown == "all"))
        raise SystemExit(0)
    words = _with_sections(_in_one_spelling(words, parser), parser)
    try:
        parsed, unknown = parser.parse_known_args(words)
        files = _files(unknown, parser, verb)
        values = source(parsed_args=parsed)()
    except (argparse.ArgumentError, SettingsError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([f"{_said(error)}; see modern-llm {verb} --help"]) from error
    _refuse_twice(vars(parsed), files, words)
    return values | ({"config": files[0]} if files else {})


def _help(words: list[str]) -> str | None:
    """Return the word after `--help`, or an empty one; None without `--help`."""
    words = words[: words.index("--")] if "--" in words else words
    found = [at for at, word in enumerate(words) if word in ("-h", "--help")]
    return next(iter(words[found[0] + 1 :]), "") if found else None


def _in_one_spelling(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Write option names as the parser knows them: hyphens and underscores are alike."""
    known = {option.replace("-", "_"): option for option in parser._option_string_actions}
    result: list[str] = []
    for at, word in enumerate(words):
        if word == "--":
            return result + words[at:]
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = known.get(name.replace("-", "_"), name)
        result.append(f"{name}{equals}{value}")
    return result


def _with_sections(words: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Write `--data FILE` as `--data.dataset_name FILE`; refuse other words for a section.

    A section given whole is a JSON object, or null where it may be missing.
    """
    names = [action.dest for action in parser._actions]
    sections = {name[:at] for name in names for at, letter in enumerate(name) if letter == "."}
    result, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        option, equals, value = word.partition("=")
        name = option.removeprefix("--")
        if option == name or name not in sections:
            result.append(word)
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        if value == "null" or value.startswith("{"):
            result.append(f"{option}={_whole_section(option, value)}")
        elif value and name == "data" and not value.endswith((".yaml", ".yml")):
            result.append(f"--data.dataset_name={value}")
        else:
            raise ConfigError([_no_section(name, value)])
    return result


def _whole_section(option: str, value: str) -> str:
    try:
        json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"command line: {option}: not a JSON object: {error}"]) from error
    return value


def _no_section(name: str, value: str) -> str:
    said = f"command line: --{name} {value}".rstrip()
    if value.endswith(CONFIGURATIONS):
        return f"{said}: {name} is a section; a configuration file is --config {value}"
    files = f", or --{name} FILE for --{name}.dataset_name FILE" if name == "data" else ""
    return f"{said}: {name} is a section; set its options one by one, as --{name}.OPTION{files}"


def _files(unknown: list[str], parser: argparse.ArgumentParser, verb: str) -> list[str]:
    """Return the configuration files among the words that are no options; refuse the others."""
    takes_words = any(not action.option_strings for action in parser._actions)
    options = [
        option
        for action in parser._actions
        if action.help != argparse.SUPPRESS
        for option in action.option_strings
    ]
    files: list[str] = []
    problems: list[str] = []
    rest = list(unknown)
    while rest:
        word = rest.pop(0)
        if word.startswith("-") and word not in ("-", "--"):
            name = word.partition("=")[0]
            if word == name and rest and not rest[0].startswith("-"):
                word = f"{word} {rest.pop(0)}"
            hint = meaning_here(_last_part(name), options) or close_to(name, options)
            problems.append(f"command line: {word}: {verb} has no option {name}{hint}")
        elif not takes_words and _is_configuration(word):
            files.append(word)
        elif word != "--":
            known = f"; data is named by --data {word}" if word.endswith(".jsonl") else ""
            problems.append(f"command line: {verb} has no use for the word {word!r}{known}")
    if problems:
        raise ConfigError(problems)
    return files


def _last_part(option: str) -> str:
    """Return the name of an option without its section, as files of other trainers write it."""
    return option.lstrip("-").rpartition(".")[2].replace("-", "_")


def _is_configuration(word: str) -> bool:
    return word.endswith(CONFIGURATIONS) or (os.path.isfile(word) and not word.endswith(".jsonl"))


def _refuse_twice(parsed: dict[str, Any], files: list[str], words: list[str]) -> None:
    """Refuse what names one thing twice: two configuration files, or both forms of an option."""
    options = [word.partition("=")[0] for word in words]
    problems = []
    if len(files) + options.count("--config") > 1:
        named = " and ".join([*files, *(["--config"] if "--config" in options else [])])
        problems.append(f"command line: two configuration files ({named}): keep one")
    problems += [
        f"command line: --{short} and --{long} set the same option: keep one"
        for long, short in LONG_FORMS.items()
        if long in parsed and short in parsed
    ]
    if problems:
        raise ConfigError(problems)


def _said(error: Exception) -> str:
    """Return what argparse or pydantic-settings says, as `command line: option: problem`."""
    name = (getattr(error, "argument_name", None) or "").rpartition("/")[2]
    message = getattr(error, "message", None) or str(error)
    message = message.replace("Parsing error encountered for ", "--")
    message = message.replace(
        "not enough values to unpack (expected 2, got 1)", "write NAME=VALUE,NAME=VALUE or JSON"
    )
    if message.startswith("ignored explicit argument"):
        message = f"takes no value, got {message.removeprefix('ignored explicit argument ')}"
    return f"command line: {name + ': ' if name else ''}{message}"
