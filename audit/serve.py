"""Run one operation of a trainer's adapter: python audit/serve.py NAME OPERATION REQUEST ANSWER

Runs in the environment of that trainer. REQUEST and ANSWER are JSON files. Under torchrun every
rank runs it, and rank 0 answers.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


class NotOffered(Exception):
    """The trainer has no documented way to do this; the text says so."""


class NeedsGPU(Exception):
    """The trainer documents this for GPUs only, and there is none."""


class SaveWindow:
    """Counts what a process changes on disk during one save, and kills it at one of these changes.

    Opening for writing, renaming, removing and making folders are seen through Python's audit
    events, whichever library does them; bytes written by compiled code are not.
    """

    EVENTS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.truncate"}

    def __init__(self, folder: str, kill_at: int):
        self.folder, self.kill_at = os.path.realpath(folder), kill_at
        self.open, self.count = False, 0
        sys.addaudithook(self._seen)

    def _seen(self, event: str, values: tuple[Any, ...]) -> None:
        if not self.open:
            return
        if event == "open":
            path, mode, flags = values
            writing = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if not writing and not set(str(mode or "")) & set("wax+"):
                return
        elif event in self.EVENTS:
            path = values[0]
        else:
            return
        if isinstance(path, int) or not self._inside(os.fspath(path)):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _inside(self, path: str | bytes) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)


def step_done(request: dict[str, Any], window: SaveWindow | None, step: int) -> None:
    """What the adapters call after each optimizer step, before a save of that step."""
    if step == request.get("die_after_step"):
        os.kill(os.getpid(), signal.SIGKILL)
    if window is not None:
        window.open = step == request["watched_save"]


def main() -> int:
    """Serve one request."""
    name, operation, asked, answered = sys.argv[1:]
    request = json.loads(Path(asked).read_text("utf-8"))
    window = None
    if "watched_save" in request:
        window = SaveWindow(request["out"], request.get("kill_at", 0))
    # The adapters import these classes by this name, not by that of the script.
    sys.modules["serve"] = sys.modules[__name__]
    adapter = importlib.import_module(f"trainers.{name}")
    try:
        answer = getattr(adapter, operation)(request, lambda step: step_done(request, window, step))
    except NotOffered as error:
        answer = {"not_offered": str(error)}
    except NeedsGPU as error:
        answer = {"needs_gpu": str(error)}
    if window is not None:
        answer["events"] = window.count
    if os.environ.get("RANK", "0") == "0":
        Path(answered).write_text(json.dumps(answer), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
