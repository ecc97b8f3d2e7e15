"""The step in `outcome.json` is the last completed one, independent of logging and saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from modern_llm.config.errors import Stopped, UserError
from modern_llm.distributed.runtime import Runtime
from modern_llm.training import loop
from modern_llm.training.run import data_changes
from tests.helpers.ranks import run_ranks
from tests.helpers.small import run_small
from tests.helpers.zero import stage, use_deepspeed

RARE = {"log_every": 100, "save_every": 4, "max_steps": 9}


def outcome(folder: Path) -> tuple[int, int]:
    """Return status and last step, once rank 0 has written them."""
    if dist.is_initialized():
        dist.barrier()
    found = json.loads((folder / "outcome.json").read_text())
    return found["status"], found["last_step"]


class Trouble:
    """Makes a run fail on every rank, or stop, at one function."""

    def __init__(self, owner: Any, name: str, error: type[BaseException], step: int | None = None):
        self._owner, self._name, self._error, self._step = owner, name, error, step
        self._real = getattr(owner, name)

    def __enter__(self) -> None:
        def failing(*arguments: Any, **options: Any) -> Any:
            if self._step is None or self._step in arguments:
                raise self._error("made to fail")
            return self._real(*arguments, **options)

        setattr(self._owner, self._name, failing)

    def __exit__(self, *error: object) -> None:
        setattr(self._owner, self._name, self._real)


def fails(folder: Path, trouble: Trouble, **changes: Any) -> tuple[int, int]:
    with trouble, pytest.raises((ValueError, UserError), match="made to fail"):
        run_small(folder, **(RARE | changes))
    return outcome(folder)


def in_a_step(step: int) -> Trouble:
    """An error in a step, counted from 0, so that as many steps are done."""
    return Trouble(loop, "_optimizer_step", ValueError, step)


def endings(folder: Path) -> dict[str, tuple[int, int]]:
    """Return status and last step of runs that end in several ways."""
    found = {"step 7": fails(folder / "a", in_a_step(6))}
    # Restarted, it fails before the loop: first before, then after it knows its checkpoint.
    found["before the loop"] = fails(
        folder / "a", Trouble(data_changes, "find_checkpoint", UserError)
    )
    found["preparing"] = fails(folder / "a", Trouble(Runtime, "prepare", UserError))
    found["resumed"] = fails(folder / "a", in_a_step(4))
    found["evaluation"] = fails(folder / "b", Trouble(loop, "_evaluate_if_due", ValueError, 5))
    found["first"] = fails(folder / "c", in_a_step(0))
    with Trouble(loop, "_evaluate_if_due", Stopped, 3), pytest.raises(Stopped):
        # A stop in the work after a step: the step is done, saved, and reported.
        real, loop.stop_asked = loop.stop_asked, lambda runtime: True
        check, loop.check = loop.check, _stop_after_a_step(loop.check)
        try:
            run_small(folder / "d", **RARE)
        finally:
            loop.stop_asked, loop.check = real, check
    found["stopped"] = outcome(folder / "d")
    run_small(folder / "a", **RARE)
    found["done"] = outcome(folder / "a")
    return found


def _stop_after_a_step(real: Any) -> Any:
    def check(runtime: Any, where: str) -> None:
        if where.endswith("saved"):
            raise Stopped(where)
        real(runtime, where)

    return check


EXPECTED = {
    "step 7": (1, 6), "before the loop": (2, 6), "preparing": (2, 4), "resumed": (1, 4),
    "evaluation": (1, 5), "first": (1, 0), "stopped": (75, 1), "done": (0, 9),
}  # fmt: skip


def test_one_process(tmp_path):
    assert endings(tmp_path) == EXPECTED


def on_a_rank(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    found = {}
    for zero in (None, 2):
        use_deepspeed(None if zero is None else stage(zero), folder)
        (folder / str(zero)).mkdir(exist_ok=True)
        found[str(zero)] = endings(folder / str(zero))
    assert dist.get_world_size() == 2
    return found


@pytest.mark.slow
def test_two_processes_also_under_deepspeed(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    for found in run_ranks(on_a_rank, 2, tmp_path, timeout=280):
        assert found == {"None": EXPECTED, "2": EXPECTED}
