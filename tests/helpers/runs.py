"""Whole runs by the command line in forked processes, for tests that stop, hang or kill many.

Called in the forks that `tests.helpers.forks` starts.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

from modern_llm import cli
from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import status_of
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.rendezvous import handshake
from modern_llm.distributed.shutdown import process_exit
from modern_llm.distributed.shutdown.signals import StopRequest
from modern_llm.reference.answers import Answers
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.storage.atomic import verified_manifest
from modern_llm.training import accumulation as step
from modern_llm.training import loop, train_dpo, train_lm, train_sft, window


def command(arguments: list[str], environment: dict[str, str], trick: str = "") -> None:
    """Run a verb of the command line and end with its status.

    Args:
        trick: on rank 1: `gil:STEP` never releases the interpreter in that step; `metrics:STEP`
            never averages that step's metrics; `slow:S` sleeps S seconds in every step.
    """
    os.environ |= environment
    kind, _, value = trick.partition(":")
    if kind and os.environ.get("RANK", "0") == "1":
        _play(kind, value)
    cli.leave(cli.main(arguments))


def _play(kind: str, value: str) -> None:
    real, over_ranks = step.around, window.over_ranks

    def around(name: str) -> Any:
        if name == "loader" and kind == "slow":
            ctypes.CDLL(None).usleep(int(float(value) * 1e6))
        if name == "loader" and kind == "gil" and step.heartbeat.here.step == int(value):
            ctypes.PyDLL(None).sleep(600)
        return real(name)

    def never(*sums: Any) -> Any:
        if step.heartbeat.here.step == int(value):
            time.sleep(600)
        return over_ranks(*sums)

    step.around = around
    if kind == "metrics":
        window.over_ranks = never


def write_run(file: Path, settings: dict[str, Any]) -> list[str]:
    """Write a configuration; return the arguments that name it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file)]


@dataclass(frozen=True)
class Inputs:
    """What the three stages read."""

    tokenizer: Path
    documents: Path
    answers: Path
    pairs: Path


STEPS, SAVE_EVERY = 7, 2


def train_config(inputs: Inputs, folder: Path, name: str, **changes: Any) -> TrainingConfig:
    fields = {
        "run_name": name, "output_dir": folder / name, "batch_size": 4, "max_steps": STEPS,
        "log_every": 1, "save_every": SAVE_EVERY, "learning_rate": 1e-3,
        "tokens_per_micro_batch": 256, "tokenizer_name": str(inputs.tokenizer),
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def pipeline(inputs: Inputs, folder: Path) -> None:
    """Pretrain, SFT, reference and DPO in one process of a world; ends with the status of a run.
    The latter two save beside the training.

    Leaves `up.<rank>` when signals are heard, `met.<rank>` when all have met, and a line `stage
    step` in `steps` for each step.
    """
    rank = os.environ.get("RANK", "0")
    os.environ["MODERN_LLM_CACHE"] = str(folder / "cache")
    transformers.utils.logging.disable_progress_bar()
    steps = os.open(folder / "steps", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    real = loop._optimizer_step

    def noted(context: Any, step: int):
        result = real(context, step)
        if rank == "0":
            os.write(steps, f"{context.config.run_name} {step}\n".encode())
        return result

    def met(*args: Any, **options: Any) -> Any:
        notes = meet(*args, **options)
        (folder / f"met.{rank}").touch()
        return notes

    loop._optimizer_step = noted
    meet, handshake.meet = handshake.meet, met
    with StopRequest():
        (folder / f"up.{rank}").touch()
        status = 0
        try:
            _three_stages(inputs, folder)
            process_exit.leave(status)
        except Exception as error:
            traceback.print_exc()
            status = status_of(error)
        # Not by the interpreter's exit: handlers would go first, and a late signal would kill.
        os._exit(status)


def _three_stages(inputs: Inputs, folder: Path) -> None:
    shape = ModernLLMConfig(
        vocab_size=300, d_model=16, n_layers=1, n_heads=2, ffn_hidden_size=32, max_seq_len=128,
        dropout=0.1, initializer_range=0.1,
    )  # fmt: skip
    first = train_lm.run_training(
        shape,
        train_config(inputs, folder, "pretrain"),
        DocumentDatasetConfig(dataset_name=str(inputs.documents)),
    )
    second = train_sft.run_sft(
        first,
        train_config(inputs, folder, "sft", background_saving=True),
        InstructionDatasetConfig(dataset_name=str(inputs.answers)),
    )
    train_dpo.run_dpo(
        second,
        train_config(inputs, folder, "dpo", eval_every=3, background_saving=True),
        train_dpo.DPOConfig(max_length=96, flush_every=6),
        PreferenceDatasetConfig(dataset_name=str(inputs.pairs), eval_fraction=0.2),
    )


def end_state(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on who was killed or stopped, and when."""
    found: dict[str, Any] = {}
    for stage in ("pretrain", "sft", "dpo"):
        run = folder / stage
        checkpoint = run / "checkpoints" / f"step-{STEPS - 1:08d}"
        verified_manifest(checkpoint)
        for path in [run / f"{stage}_final" / "model.safetensors", *checkpoint.iterdir()]:
            if path.name != "MANIFEST.json":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[f"{stage}/{path.parent.name}/{path.name}"] = digest
        drawn = {"elapsed_s", "tokens_per_second", "memory_gb", "mfu"}
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found[f"{stage}/metrics"] = [
            {k: v for k, v in json.loads(line).items() if k not in drawn} for line in lines
        ]
        assert [r["step"] for r in found[f"{stage}/metrics"]] == list(range(1, STEPS + 1))
        assert json.loads((run / "outcome.json").read_text())["status"] == 0
    (place,) = (folder / "cache" / "references").iterdir()
    store = ReferenceStore.open(place)
    intact, problems = store.verify()
    assert intact and not problems
    for table in ("train", "evaluation"):
        keys = Answers(TokenTable.open(folder / "dpo" / "data" / table)).keys
        entries = store.find(keys)
        assert len(entries) == len(keys)
        found[table] = (entries.keys.tobytes(), entries.sums.tobytes(), entries.counts.tobytes())
    return found
