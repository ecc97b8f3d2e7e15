"""Modules of a user that are imported before a configuration is checked (`--plugins`).

A plugin calls `register_loss` or `register_format` when it is imported. Every process imports it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable

from modern_llm.config.errors import ConfigError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_loaded: list[str] = []


def load_plugins(names: Iterable[str]) -> None:
    """Import modules by name, also from the current folder.

    Raises:
        ConfigError: a name is no module's, or its import fails, with the reason of each.
    """
    problems = []
    if (here := os.getcwd()) not in sys.path:  # the console script does not search it
        sys.path.append(here)
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"plugins: {name!r} is no module's name: write package.module")
            continue
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module of a user may raise anything
            why = f"{type(error).__name__}: {error}"
            problems.append(
                f"plugins: {name} cannot be imported ({why}): fix it, or put its folder on "
                "PYTHONPATH"
            )
        else:
            if name not in _loaded:
                _loaded.append(name)
    if problems:
        raise ConfigError(problems)


def loaded_plugins() -> list[str]:
    """Return the names of the imported plugins, which `config.yaml` records."""
    return list(_loaded)
