"""The real loop, checkpoints and run folder around a model of a few hundred numbers.

For tests that kill or refuse a run many times: a run of four steps takes a fraction of a second in
a forked process, and what is under test is what is used in earnest. No data, no tokenizer.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

STEPS = 4
MODULES = (
    "modern_llm.training.loop", "modern_llm.training.run.outcome", "modern_llm.distributed.runtime",
    "tests.helpers.small", "tests.helpers.zero", "torch._dynamo",
)  # fmt: skip


class Batch:
    """One micro-batch: (rows, width) numbers."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def to(self, device: torch.device) -> Batch:
        return Batch(self.rows.to(device))


class Fit:
    """A task: make the outputs of random rows small; the rows are a function of (step, rank)."""

    judged_by = frozenset({"loss"})
    between = None

    def __init__(self, rank: int, world: int, width: int, loud: tuple[int, ...] = ()):
        from modern_llm.training.guards.memory import TokenBudget

        self.rank, self.world, self.width, self.loud = rank, world, width, loud
        self.budget = TokenBudget([SimpleNamespace(most_tokens=None)], auto=False)

    def steps_in(self, epochs: float) -> int:
        return STEPS

    def ready(self, step: int) -> bool:
        return True

    def micro_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(4, self.width, generator=generator)
        rows *= 30 if step in self.loud else 1
        return [Batch(rows[self.rank :: self.world])]

    def origins(self, step: int) -> list[list[str]]:
        return [["rows:1"]]

    def denominator(self, step: int) -> float:
        return 4.0

    def prepare(self, model, step, micro_batches):
        return micro_batches

    def run(self, model, batch):
        from modern_llm.training.task import StepSums

        loss = model(batch.rows).square().sum()
        numbers = {"loss": loss.detach().double(), "tokens": torch.tensor(4.0)}
        return StepSums(loss, numbers | {"flops": torch.tensor(0.0)})

    def metrics(self, sums):
        return {"loss": sums["loss"]}

    def consumed(self, steps: int) -> int:
        return 4 * steps

    def evaluation(self):
        return None


class Scorer(nn.Module):
    """What the loop is given: `.model` is what is saved."""

    def __init__(self, width: int):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.model(rows)


def run_small(
    folder: Path,
    width: int = 8,
    saved: list[int] | None = None,
    loud: tuple[int, ...] = (),
    **settings,
) -> None:
    """Train to the end in `folder`, resumed if it has a checkpoint, and export.

    Args:
        loud: steps, from 0, whose rows are far larger than those of the others.
    """
    from modern_llm.config import TrainingConfig
    from modern_llm.distributed.optimizer_shards import full_parameters
    from modern_llm.distributed.runtime import start
    from modern_llm.training import loop
    from modern_llm.training.checkpointing import format, saver
    from modern_llm.training.context import Resume
    from modern_llm.training.run import data_changes, outcome
    from modern_llm.training.run.folder import RunFolder

    fields = {"batch_size": 4, "max_steps": STEPS, "save_every": 1, "log_every": 1} | settings
    config = TrainingConfig(run_name="r", output_dir=folder, learning_rate=1e-2, **fields)
    record = {"train": {"run_name": "r"}}
    runtime = start(config)
    run = RunFolder(config, record)
    drawn = outcome.write_report
    outcome.write_report = lambda run: None  # drawings take longer than the run
    real = saver.Saver._saved

    def noted(self, step):
        if saved is not None and runtime.is_main:
            saved.append(step)
        real(self, step)

    saver.Saver._saved = noted
    try:
        with outcome.outcome_recorded(runtime, run):
            found = data_changes.find_checkpoint(runtime, run)
            runtime.on_main(run.open)
            task = Fit(runtime.rank, runtime.world, width, loud)
            engine = loop.train(runtime, Scorer(width), task, run, Resume(found))
            state = {n: t.clone().contiguous() for n, t in full_parameters(engine)}
            with runtime.committed_folder(run.final, {}) as place:
                if runtime.is_main:
                    format.write_tensors(place / "model.safetensors", state, {})
                    (place / "config.json").write_text("{}")
    finally:
        saver.Saver._saved, outcome.write_report = real, drawn


def child(
    folder: str,
    fault: str,
    stage: int | None = None,
    log: str = "",
    settings: dict[str, Any] | None = None,
) -> None:
    """`run_small` in a forked process under a fault; ends with the status of a command.

    Args:
        fault: of `MODERN_LLM_FAULT`; empty for none.
        stage: ZeRO stage; None without DeepSpeed.
        log: a file that gets the name of every fault point that is reached.
        settings: of the run, beside those of all small runs.
    """
    from modern_llm.config.errors import status_of
    from modern_llm.distributed.rendezvous import handshake
    from modern_llm.storage import fault_points
    from tests.helpers.zero import stage as content
    from tests.helpers.zero import use_deepspeed

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    use_deepspeed(None if stage is None else content(stage), Path(folder).parent)
    if log:
        # Set, so that points are looked at; none has this name.
        os.environ[fault_points.VARIABLE] = "nowhere.before:0:1:kill"
        fault_points.reach = lambda point: _note(log, point)
    elif fault:
        os.environ[fault_points.VARIABLE] = fault
    if "collective.group" in fault:
        handshake.JOIN_SECONDS = 8.0  # a test waits for it
    status = 0
    saved = Saved(Path(folder).with_suffix(".saved"))
    try:
        run_small(Path(folder), saved=saved, **(settings or {}))
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        status = status_of(error)
    os._exit(status)


class Saved(list):
    """Steps whose checkpoint was committed, also after the process was killed."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def append(self, step: int) -> None:
        with self._path.open("a") as file:
            file.write(f"{step}\n")


def _note(log: str, point: str) -> None:
    with open(f"{log}.{os.environ.get('RANK', '0')}", "a") as file:
        file.write(f"{point}\n")


def numbers(folder: Path) -> list[tuple]:
    """(step, loss, norm, rate) of every logged step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"]) for r in map(json.loads, lines)]
