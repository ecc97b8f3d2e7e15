"""Whole runs by the command line in forked processes, for tests that stop, hang or kill many.

Called in the forks that `tests.helpers.forks` starts.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from modern_llm import cli
from modern_llm.training import loop, train_dpo, train_lm, train_sft

STAGES = (train_lm, train_sft, train_dpo)  # imported before the fork


def command(arguments: list[str], environment: dict[str, str], trick: str = "") -> None:
    """Run a verb of the command line and end with its status.

    Args:
        trick: `gil:STEP` never gives the interpreter back in that step on rank 1; `slow:S` sleeps
            S seconds in every step on rank 1.
    """
    os.environ |= environment
    kind, _, value = trick.partition(":")
    if kind and os.environ.get("RANK", "0") == "1":
        _play(kind, value)
    status = cli.main(arguments)
    if status == 0:
        cli.leave_together()
    sys.exit(status)


def _play(kind: str, value: str) -> None:
    real = loop.around

    def around(name: str) -> Any:
        if name == "loader" and kind == "slow":
            ctypes.CDLL(None).usleep(int(float(value) * 1e6))
        if name == "loader" and kind == "gil" and loop.progress.here.step == int(value):
            ctypes.PyDLL(None).sleep(600)
        return real(name)

    loop.around = around


def write_run(file: Path, settings: dict[str, Any]) -> list[str]:
    """Write a configuration; return the arguments that name it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file)]
