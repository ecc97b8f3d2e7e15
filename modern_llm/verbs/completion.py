"""The verb `completion`: a script that lets the shell complete verbs and options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from pydantic_settings import CliPositionalArg

from modern_llm.config.errors import UserError
from modern_llm.verbs.command_line import add_options
from modern_llm.verbs.settings import Settings

Verbs = Mapping[str, tuple[type[Settings], Callable[[Any], Any]]]


class CompletionSettings(Settings):
    """Print what makes a shell complete verbs and options: completion bash|zsh|tcsh."""

    example: ClassVar[str] = "modern-llm completion bash > modern-llm.bash"

    shell: CliPositionalArg[Literal["bash", "zsh", "tcsh"]]
    """bash, zsh or tcsh."""


def completion(settings: CompletionSettings, verbs: Verbs) -> dict[str, Any]:
    """Print the script; `modern-llm completion bash > FILE`, and source FILE.

    Args:
        verbs: verb -> (settings, what it does), as the command line knows them.
    """
    try:
        import shtab
    except ImportError as error:
        raise UserError(
            "completion needs the package shtab: pip install 'modern-llm[completion]'"
        ) from error
    script = shtab.complete(whole_parser(verbs), shell=settings.shell)
    if not settings.json_output:
        print(script)
    return {"shell": settings.shell, "script": script}


def whole_parser(verbs: Verbs) -> argparse.ArgumentParser:
    """Return one parser with every verb below it, from the very settings that the verbs read."""
    parser = argparse.ArgumentParser(prog="modern-llm", allow_abbrev=False)
    places = parser.add_subparsers()
    groups: dict[str, Any] = {}
    for verb, (schema, _) in verbs.items():
        first, _, second = verb.partition(" ")
        summary = " ".join((schema.__doc__ or "").split()).replace("%", "%%")
        if second:
            if first not in groups:
                groups[first] = places.add_parser(first).add_subparsers()
            verb_parser = groups[first].add_parser(second, help=summary, allow_abbrev=False)
        else:
            verb_parser = places.add_parser(first, help=summary, allow_abbrev=False)
        add_options(verb_parser, schema)
        if "dry_run" in schema.model_fields:
            verb_parser.add_argument("--dry-run", action="store_true")
    return parser
