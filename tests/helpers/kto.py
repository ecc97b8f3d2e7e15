"""Labelled responses and KTO runs on a tiny model, shared by the tests of the stage."""

from __future__ import annotations

import json
import random
from pathlib import Path

from modern_llm.config import LabelledDatasetConfig, TrainingConfig
from modern_llm.training.train_kto import KTOConfig, run_kto
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

ROWS, BATCH, SEED, STEPS, RATE, LENGTH = 21, 6, 7, 7, 2e-3, 64
BETA, WEIGHTS = 0.3, (1.5, 0.75)


def labelled(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number, row in enumerate(transcripts(count, seed)):
        prompt, _, answer = row["chosen"].rpartition("Assistant:")
        # Every third row has the prompt of the row before it.
        prompt = rows[-1]["prompt"] if number % 3 == 2 else f"{prompt}Assistant:"
        rows.append({"prompt": prompt, "completion": answer, "label": rng.random() < 0.8})
    return rows


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Return a checkpoint and a file of rows."""
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    return checkpoint, write_jsonl(folder / "rows.jsonl", labelled(ROWS))


def settings(folder: Path, **changes) -> TrainingConfig:
    options = {
        "run_name": "k", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": RATE, "schedule": "constant", "weight_decay": 0.05, "log_every": 1,
        "seed": SEED,
    }  # fmt: skip
    return TrainingConfig(**(options | changes))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def our_run(checkpoint, data, folder, kto=(), lora=None, **changes) -> list[dict]:
    options = {"max_length": LENGTH, "beta": BETA} | dict(kto)
    options |= {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    run_kto(
        checkpoint,
        settings(folder, **changes),
        KTOConfig(**options),
        LabelledDatasetConfig(dataset_name=str(data)),
        lora_config=lora,
    )
    return records(folder)
