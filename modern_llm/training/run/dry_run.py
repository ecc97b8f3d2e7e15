"""`--dry-run`: a run up to its first backward, in a temporary folder.

A stage makes the same checks, tables and model as in a real run; its data is reduced to the first
optimizer step. Nothing is kept, and nothing is written to the user's reference store.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from modern_llm.config import TrainingConfig
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.data.batch.order import Order
from modern_llm.data.table.build import Prepared, holds_ids
from modern_llm.data.table.iterate import evaluation_source, training_sources
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.load import inspect_checkpoint, load_tokenizer
from modern_llm.models.scorer import TokenScorer
from modern_llm.storage import temporary
from modern_llm.training.monitoring.metrics import peak_memory_gb
from modern_llm.training.optimizers import make_optimizer
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.task import Task

CACHE = "MODERN_LLM_CACHE"


class DryRun:
    """State of one dry run; `result` collects what it reports."""

    def __init__(self) -> None:
        self.result: dict[str, Any] = {}
        self.folder: Path | None = None
        self._removes = True

    @contextmanager
    def cleaned_up(self) -> Iterator[None]:
        """Remove the folder at the end, also after an error, and restore `MODERN_LLM_CACHE`."""
        before = os.environ.get(CACHE)
        try:
            yield
        finally:
            if self.folder is not None:
                temporary.remove(self.folder) if self._removes else temporary.forget(self.folder)
            if before is None:
                os.environ.pop(CACHE, None)
            else:
                os.environ[CACHE] = before

    def aside(self, runtime: Runtime, run: RunFolder) -> RunFolder:
        """Return a temporary run folder that replaces `run`, the same one on every process."""
        folder = tempfile.mkdtemp(prefix="modern-llm-dry-") if runtime.is_main else ""
        self.folder = Path(runtime.from_main(folder))
        temporary.remember(self.folder)
        self.folder.mkdir(exist_ok=True)
        # One process per machine removes it: others may be done while this one still writes.
        self._removes = runtime.accelerator.is_local_main_process
        # Mode `store` only reads the user's store; the other modes might write to it.
        sections = (run.record.get(name, {}) for name in ("dpo", "kto"))
        if all(section.get("reference") != "store" for section in sections):
            os.environ[CACHE] = str(self.folder / "reference")
        config = dataclasses.replace(run.config, output_dir=self.folder / "run", resume="auto")
        self.result["configuration"] = run.record
        return RunFolder(config, run.record, dry_run=True)

    def first_step_only(self, prepared: Prepared, config: TrainingConfig) -> Prepared:
        """Report the size of the data, and return the examples of the first step."""
        table = prepared.train
        self.result["data"] = {
            "lines": prepared.lines(),
            "examples": len(table),
            "evaluation_examples": len(prepared.evaluation or ()),
        }
        order = Order(
            len(table),
            config.batch_size,
            config.seed,
            by=prepared.order,
            keys=prepared.order_keys(),
        )
        self._steps = order.steps_per_epoch
        rows = order.step(0)
        self.result["first_example"] = table.origin(int(rows[0]))
        return dataclasses.replace(prepared, train=table.select(rows), evaluation=None)

    def first_step(
        self, runtime: Runtime, scorer: TokenScorer, task: Task, config: TrainingConfig
    ) -> None:
        """Run one forward, backward and optimizer step on the first micro-batch."""
        epochs = config.epochs or 1
        steps = config.max_steps or max(1, round(epochs * self._steps))
        if config.warmup_steps > steps:
            raise ConfigError(
                [f"train.warmup_steps {config.warmup_steps} is above the {steps} steps of this run"]
            )
        heartbeat.enter("preparing the engine")
        engine = runtime.prepare(scorer, make_optimizer(config, scorer))
        model = engine.model
        model.train()  # DeepSpeed's `train` returns None
        heartbeat.enter("loading the batch")
        batches = task.micro_batches(0)
        began = time.perf_counter()
        heartbeat.enter("forward and backward")
        (batch,) = task.prepare(model, 0, [batches[0].to(runtime.device)])
        sums = task.run(model, batch)
        engine.backward(sums.loss * runtime.world / task.denominator(0), last=True)
        loss = float(sums.loss.detach())
        heartbeat.enter("optimizer")
        norm = engine.step(config.max_grad_norm).grad_norm
        if not torch.isfinite(torch.tensor([loss, norm])).all():
            raise UserError(
                f"dry run: loss {loss} and gradient norm {norm} of the first "
                "micro-batch: one is not finite; check the checkpoint and train.mixed_precision"
            )
        totals = {name: float(value) for name, value in sums.statistics.items()}
        area = batch.ids.numel()
        self.result |= {
            "steps": steps,
            "first_batch": {
                "examples": int(task.denominator(0)) if "pairs" in totals else config.batch_size,
                "micro_batches_per_process": len(batches),
                "processes": runtime.world,
                "rows": batch.ids.shape[0],
                "row_tokens": batch.ids.shape[1],
                "real_tokens": batch.real_tokens,
                "padding": round(1 - batch.real_tokens / area, 4),
                "targets": int(batch.targets.shape[1]),
            },
            "forward_backward": {
                "seconds": round(time.perf_counter() - began, 3),
                "metrics": task.metrics(totals),
                "grad_norm": norm,
                "memory_gb": round(peak_memory_gb(runtime.device), 3),
                "device": str(runtime.device),
            },
        }


def contradictions(
    config: TrainingConfig,
    data: DatasetConfig,
    *,
    checkpoint: str | None,
    tokenizer: str | None,
    max_length: int | None,
) -> list[str]:
    """Return all errors that can be found without reading data or loading weights.

    A run stops at the first error; here every check is made.

    Args:
        checkpoint: initial checkpoint of the stage, None for pretraining.
        tokenizer: the `tokenizer_name` argument, which overrides the checkpoint's tokenizer.
        max_length: maximum tokens of a sequence, if set.
    """
    problems: list[str] = []

    def collect(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ConfigError as error:
            problems.extend(error.problems)
        except UserError as error:
            problems.append(str(error))
        return None

    if config.precision == "fp16" and not torch.cuda.is_available():
        problems.append("train.mixed_precision fp16 needs a GPU: use bf16 or no on this machine")
    found = collect(lambda: inspect_checkpoint(checkpoint)) if checkpoint else None
    own = found.place if found is not None and found.has_tokenizer else None
    for name in dict.fromkeys(filter(None, (tokenizer, own, config.tokenizer_name))):
        collect(lambda name=name: load_tokenizer(name))
    named = None
    if data.names or config.dataset_name:
        named = data if data.names else dataclasses.replace(data, dataset_name=config.dataset_name)
    if not (tokenizer or own or config.tokenizer_name) and (found or not checkpoint):
        if named is None or not collect(lambda: holds_ids(named)):
            problems.append(
                "train.tokenizer_name: no tokenizer is named and the checkpoint has none"
            )
    if found is not None and max_length and found.positions and max_length > found.positions:
        problems.append(
            f"max_length {max_length} is above the {found.positions} positions of {checkpoint}"
        )
    if named is not None:
        collect(lambda: training_sources(named))
        collect(lambda: evaluation_source(named))
    else:
        problems.append("data.dataset_name: no data set is named; give a Hub id, a file or folder")
    return list(dict.fromkeys(problems))
