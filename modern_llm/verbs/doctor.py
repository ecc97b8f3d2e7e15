"""The verb `doctor`: what this machine has, and what would stop a run on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import json_line
from modern_llm.verbs.settings import Settings


class DoctorSettings(Settings):
    """Check versions, devices, process group, compilers, stale locks, disk, write and Hub
    access."""

    example: ClassVar[str] = "modern-llm doctor run.yaml"

    config_is_of_a_stage: ClassVar[bool] = True

    output_dir: Path | None = None
    """Folder that a run would write into; that of --config, or the current one, by default."""
    skip_group: bool = False
    """Leave out the check that starts two processes."""


def doctor(settings: DoctorSettings) -> dict[str, Any]:
    """Make every check, show them, and raise the first problem as the one-line error."""
    from modern_llm.storage.file_digests import cache_root
    from modern_llm.verbs.doctor_checks import (
        as_result,
        examine_machine,
        problems_of,
        sharing_rows,
    )
    from modern_llm.verbs.stages import read_stage
    from modern_llm.verbs.terminal import show_checks

    place, stage, run = settings.output_dir, None, None
    if settings.config is not None:
        stage, run = read_stage(settings.config)
        place = place or Path(run.train.output_dir)
    checks = examine_machine([place or Path(), cache_root()], group=not settings.skip_group)
    if stage is not None and run is not None and run.train.sequence_parallel > 1:
        checks.append(sharing_rows(run.train, stage.checkpoint(run) or run.model))
    result = as_result(checks)
    if not settings.json_output:
        show_checks(result)
    if problems := problems_of(checks):
        if settings.json_output:  # an error leaves no result to print
            print(json_line(result), flush=True)
        text = "; ".join(f"{check.name}: {check.found}: {check.cure}" for check in problems)
        storage = any(check.name.startswith("write ") for check in problems)
        raise (StorageError if storage else UserError)(text)
    return result
