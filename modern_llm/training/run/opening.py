"""Start of a run: its processes, and its folder with the checks against other runs."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.config.plugins import loaded_plugins
from modern_llm.distributed import notebook
from modern_llm.distributed.runtime import Runtime, start
from modern_llm.training.monitoring.trackers import check_trackers
from modern_llm.training.optimizers import check_optimizer
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)

RATES = {"model": 3e-4, "pretrain_checkpoint": 2e-5, "sft_checkpoint": 5e-6}
"""Section or argument that only one stage has -> its default learning rate."""


def record_of(**sections: Any) -> dict[str, Any]:
    """Return the configuration as plain values for `config.yaml`, without sections that are
    None."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in sections.items() if value is not None}


def open_run(
    config: TrainingConfig, dry_run: DryRun | None = None, **sections: Any
) -> tuple[Runtime, RunFolder]:
    """Start the processes and return them with the run folder, which must not hold another run.

    Args:
        dry_run: if given, the run folder is a temporary one.
        sections: sections of `config.yaml` beside `train`; those that are None are omitted.
    """
    check_trackers(config)
    if config.learning_rate is None:
        (rate,) = (rate for section, rate in RATES.items() if section in sections)
        config = dataclasses.replace(config, learning_rate=rate)
    record = record_of(**sections, plugins=loaded_plugins() or None, train=config)
    runtime = start(config, record)
    check_optimizer(runtime, config)
    if config.batch_size < runtime.data_world:
        most = config.batch_size * config.sequence_parallel
        raise UserError(
            f"train.batch_size {config.batch_size} is smaller than the {runtime.data_world} "
            f"processes, so that some would have no examples: use at least {runtime.data_world}, "
            f"or start at most {most} processes"
        )
    run = RunFolder(config, record)
    run.refuse_odd_files()
    if dry_run is None:
        runtime.on_main(lambda: run.finished() or run.lock.refuse_if_held())
    run.refuse_foreign()
    if dry_run is not None:
        return runtime, dry_run.aside(runtime, run)
    if run.finished():
        text = f"{config.run_name} is already finished; remove {run.path} to train again"
        log.info("%s", text)
        if runtime.is_main:
            notebook.show(notebook.escaped(text), text)
            notebook.show_link(run.path / "report.html", "report")
    return runtime, run
