"""Warnings of a run, kept in `warnings.jsonl` for its report.

Whatever the package logs as a warning while a run holds its lock, on the main process. A warning
is "symptom; advice" in one line; the file has both parts and the last completed step.
"""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress

from modern_llm.config.errors import StorageError
from modern_llm.config.printable import one_line
from modern_llm.storage.atomic import write_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.untrusted import LARGEST, json_lines
from modern_llm.training.run.folder import RunFolder

MAX_WARNINGS = 100
"""Lines of the file, over all starts of a run; later warnings are only printed."""
MAX_CHARACTERS = 1000
_STEP = re.compile(r"step (\d{1,15}): ")


class WarningLog(logging.Handler):
    """Handler of the package's logger between `start` and `stop`.

    Warnings wait in memory until the run folder is open: a run that is refused leaves no file.
    """

    def __init__(self, run: RunFolder):
        super().__init__(logging.WARNING)
        self._run = run
        self._path = run.path / "warnings.jsonl"
        self._waiting: list[dict[str, object]] = []
        self._known: set[str] | None = None  # None until the file was read
        self._over = False

    def start(self) -> None:
        """Begin to collect; the run's lock is held."""
        self._over = not any(self._run.checkpoints.glob("step-*"))
        logging.getLogger("modern_llm").addHandler(self)

    def stop(self) -> None:
        """Stop collecting."""
        logging.getLogger("modern_llm").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one warning and write it if the folder is open."""
        if record.name.startswith("modern_llm.report"):
            return  # about the report itself, and repeated each time it is written
        text = one_line(record.getMessage()).removeprefix("warning: ")[:MAX_CHARACTERS]
        step = self._run.done or 0
        if found := _STEP.match(text):
            step, text = int(found[1]), text[found.end() :]
        symptom, _, advice = text.partition("; ")
        self._waiting.append({"step": step, "text": symptom, "advice": advice})
        del self._waiting[MAX_WARNINGS:]
        self.flush()

    def flush(self) -> None:
        """Write what waits, if this process may write to the folder.

        A failure is ignored: the warnings were printed, and the run's own files report the disk.
        """
        if not self._run.is_open() or self._run.lock.is_lost():
            return
        with suppress(OSError, StorageError):
            if self._known is None:
                self._known = self._read()
            for warning in self._waiting:
                if str(warning["text"]) in self._known or len(self._known) >= MAX_WARNINGS:
                    continue
                self._known.add(str(warning["text"]))
                with (
                    around("warnings.append"),
                    self._path.open("a", encoding="utf-8") as file,
                ):
                    file.write(json.dumps(warning) + "\n")
        self._waiting.clear()

    def _read(self) -> set[str]:
        """Return the texts of earlier starts; delete those of a run that starts over."""
        if self._over:
            self._path.unlink(missing_ok=True)
        try:
            values = [value for _, value in json_lines(self._path, LARGEST, follow=False)]
        except FileNotFoundError:
            return set()
        kept = [value for value in values if isinstance(value, dict)]
        # A kill may have left half a line, which the next one would be appended to.
        write_file(self._path, (json.dumps(value) + "\n" for value in kept))
        return {str(value.get("text")) for value in kept}
