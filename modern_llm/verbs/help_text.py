"""The text of `modern-llm VERB --help`: one usage line, required options, an example, sections.

Options that are rarely set are listed by `--help all` only, for verbs that say which are not.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

WIDTH = 80

_TYPES = {"str": "TEXT", "Path": "PATH", "int": "N", "float": "X", "bool": "true,false"}
_NO_DEFAULT = re.compile(r" \((default: null|default factory: \w+|default: <factory>)\)")


def help_text(parser: argparse.ArgumentParser, schema: Any, *, everything: bool) -> str:
    """Return the help of one verb.

    Args:
        parser: has the options of the verb, in groups by section.
        everything: also list options that `schema.often` leaves out.
    """
    formatter = _Formatter(parser.prog, max_help_position=26, width=WIDTH)
    positional = [action for action in parser._actions if not action.option_strings]
    words = " ".join(map(_word, positional)) or "[RUN.yaml]"
    formatter.add_usage(f"{parser.prog} {words} [--OPTION VALUE ...]", [], [])
    formatter.add_text(" ".join((schema.__doc__ or "").split()).replace("%", "%%"))
    required = [action for action in parser._actions if _is_required(action, schema)]
    _add(formatter, "required (RUN.yaml may set them)", required)
    formatter.start_section("example")
    formatter.add_text(schema.example.replace("%", "%%"))
    formatter.end_section()
    left_out = 0
    for group in parser._action_groups:
        rest = [action for action in group._group_actions if action not in required]
        rest = [action for action in rest if action.help != argparse.SUPPRESS]
        shown = [action for action in rest if everything or _is_often(action, schema.often)]
        left_out += len(rest) - len(shown)
        title = (group.title or "").replace("positional arguments", "words")
        _add(formatter, title.removesuffix(" options"), shown)
    if left_out:
        formatter.add_text(f"{parser.prog} --help all lists {left_out} more options.")
    return formatter.format_help().rstrip()


def _add(formatter: argparse.HelpFormatter, title: str, actions: list[argparse.Action]) -> None:
    if actions:
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()


def _word(action: argparse.Action) -> str:
    """Return a positional argument as the usage line has it."""
    name = action.dest.upper()
    return f"[{name} ...]" if action.nargs == "*" else name


def _is_required(action: argparse.Action, schema: Any) -> bool:
    """Whether a verb needs an option in any case, not only where its section is given."""
    field = schema.model_fields.get(action.dest.partition(".")[0])
    marked = (action.help or "").endswith("(required)") and bool(action.option_strings)
    return marked and field is not None and field.is_required()


def _is_often(action: argparse.Action, often: frozenset[str]) -> bool:
    return not often or "." not in action.dest or action.dest in often


class _Formatter(argparse.HelpFormatter):
    """Writes short names of types, and only defaults that tell something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._HelpAction):
            return "Show this text; --help all lists every option."
        text = _NO_DEFAULT.sub("", action.help or "")
        if action.nargs == 0:
            text = text.replace("(default: False)", "(default: off)")
            text = text.replace("(default: True)", "(default: on; this switches it off)")
        # The second mark is that of a section which may be left out.
        text = text.replace("(ifdef: required)", "(required in this section)")
        return text.removesuffix(" (required)")

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The last name is the documented one: --json of --json_output and --json.
        name = action.option_strings[-1] if action.option_strings else action.dest.upper()
        if action.nargs == 0 or not action.option_strings:
            return name
        return f"{name} {self._format_args(action, 'VALUE')}"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        text = re.sub(r"\b(str|Path|int|float|bool)\b", lambda m: _TYPES[m[0]], str(action.metavar))
        text = re.sub(r"list\[(\w+)\]", r"\1 ...", re.sub(r"list\[{.*}\]", "NAME ...", text))
        return lambda size: (text,) * size
