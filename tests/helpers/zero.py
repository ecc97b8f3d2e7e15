"""Runs under DeepSpeed on a few CPU processes: the environment that `accelerate launch` would set,
and DPO runs whose losses and final weights are compared."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.ranks import run_ranks

VARIABLES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_CONFIG_FILE")


@dataclass(frozen=True)
class Case:
    """One DPO run: where it writes, under which DeepSpeed JSON, with which changed settings."""

    folder: Path
    zero: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    dpo: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    """Where it starts from, if not from the one that all cases share."""
    break_at: int | None = None
    """Step (from 0) before which the run breaks off, as a killed one would."""


def stage(number: int, **options: Any) -> dict[str, Any]:
    """The smallest DeepSpeed JSON of a stage."""
    return {"zero_optimization": {"stage": number, **options}}


def use_deepspeed(content: dict[str, Any] | None, folder: Path) -> None:
    """Set or clear what `accelerate launch --use_deepspeed` leaves in the environment."""
    for name in VARIABLES:
        os.environ.pop(name, None)
    if content is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"deepspeed-{os.getpid()}.json"
    file.write_text(json.dumps(content))
    os.environ |= {VARIABLES[0]: "true", VARIABLES[1]: str(file)}


def dpo(checkpoint: Path, data: Path, case: Case) -> list[tuple[float, float, float]]:
    """Run a case; return (loss, gradient norm, learning rate) of every step."""
    from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo
    from tests.helpers.steps import broken_at

    use_deepspeed(case.zero, case.folder.parent)
    fields = {
        "run_name": "x", "output_dir": case.folder, "batch_size": 8, "max_steps": 20,
        "learning_rate": 1e-3, "warmup_steps": 3, "log_every": 1, "tokens_per_micro_batch": 300,
        "save_every": 1000,
    }  # fmt: skip
    try:
        with broken_at(case.break_at):
            run_dpo(
                case.checkpoint or checkpoint,
                TrainingConfig(**(fields | case.train)),
                DPOConfig(**({"max_length": 64} | case.dpo)),
                PreferenceDatasetConfig(dataset_name=str(data)),
            )
    except KeyboardInterrupt:
        assert case.break_at is not None
    if dist.is_initialized():  # no step waits for the one that writes the log
        dist.barrier()
    return numbers(case.folder)


def numbers(folder: Path) -> list[tuple[float, float, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(r["loss"], r["grad_norm"], r["lr"]) for r in map(json.loads, lines)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "x_final" / "model.safetensors")


def all_cases(checkpoint: Path, data: Path, cases: dict[str, Case]) -> dict[str, list]:
    """On one rank: every case, one after another in the same process."""
    from modern_llm.distributed.runtime import Runtime

    kinds = []
    real = Runtime.__init__

    def noted(self, accelerator, config):
        real(self, accelerator, config)
        kinds.append((accelerator.distributed_type.name, self.world, self.stage))

    Runtime.__init__ = noted
    result = {}
    for name, case in cases.items():
        result[name] = dpo(checkpoint, data, case)
        wanted = None if case.zero is None else case.zero["zero_optimization"]["stage"]
        kind, world, found = kinds[-1]
        assert found == wanted and (kind == "DEEPSPEED") == (wanted is not None), (name, kinds)
        assert world == int(os.environ["WORLD_SIZE"])
        assert world == (dist.get_world_size() if dist.is_initialized() else 1)
    return result


def run_cases(
    world: int, checkpoint: Path, data: Path, cases: dict[str, Case], timeout: float = 250
) -> dict[str, list]:
    """Run the cases on `world` processes, started once; return rank 0's numbers by case."""
    results = run_ranks(all_cases, world, checkpoint, data, cases, timeout=timeout)
    assert all(result == results[0] for result in results)
    return results[0]
