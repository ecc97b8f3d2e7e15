"""Between log lines nothing is read from the device: counted on the code path of CUDA."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from modern_llm.config import InstructionDatasetConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.distributed.engine import Engine
from modern_llm.setup import scorers
from modern_llm.training import loop, stage
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_sft import run_sft
from tests.helpers.text import WORDS, write_jsonl

# Operations that make a host wait for a GPU: reading values, and shapes that depend on values.
READS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::repeat_interleave.Tensor", "aten::_unique2", "aten::unique_consecutive",
    "aten::is_nonzero", "aten::bincount",
}  # fmt: skip
METHODS = ("tolist", "numpy", "cpu", "item", "__bool__", "__float__", "__int__")


class Reads(TorchDispatchMode):
    """Counts, by step, the tensor reads of the training loop."""

    def __init__(self):
        super().__init__()
        self.step = 0
        self.found: Counter = Counter()
        self.operators: set[str] = set()
        self.thread = threading.get_ident()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name + (
            f".{function._schema.overload_name}" if function._schema.overload_name else ""
        )
        masked = name.startswith("aten::index") and any(
            isinstance(at, torch.Tensor) and at.dtype == torch.bool
            for index in args[1:2]
            if isinstance(index, list | tuple)
            for at in index
        )
        if self.step:
            self.operators.add(name)
        if name in READS or masked:
            self.found[self.step, name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Count the reads in `loop.train` from the first step on, as if on a CUDA device."""
    mode = Reads()

    def counting(name, real):
        def method(self, *args, **options):
            if threading.get_ident() == mode.thread and mode.step:
                mode.found[mode.step, name] += 1
            return real(self, *args, **options)

        return method

    for name in METHODS:
        monkeypatch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
    real_train, real_step = loop.train, loop._optimizer_step

    def train(*args, **options):
        with mode:
            return real_train(*args, **options)

    def step(*args):
        mode.step = args[1] + 1
        return real_step(*args)

    # These read tensors that are always on the host.
    monkeypatch.setattr(BatchSource, "collate", not_counted(mode, BatchSource.collate))
    monkeypatch.setattr(loop, "stop_asked", not_counted(mode, loop.stop_asked))
    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(loop, "_optimizer_step", step)
    monkeypatch.setattr(Engine, "decides_on_device", True)
    monkeypatch.setattr(scorers, "_lean", lambda *_: False)  # CPU only
    return mode


def not_counted(mode, real):
    def called(*args):
        with _disable_current_modes():
            before, mode.step = mode.step, 0
            result = real(*args)
            mode.step = before
        return result

    return called


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 4, "max_steps": 9, "log_every": 4,
        "learning_rate": 1e-3, "attention": "mask", "micro_batch_size": 2,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def settled(reads: Reads) -> set[int]:
    """Return the steps with any read besides the finite flag of the previous step, one value that
    is already on its way to the host."""
    found: Counter = Counter()
    for (step, _), count in reads.found.items():
        found[step] += count
    return {step for step, count in found.items() if step and count > 2}


def test_a_dpo_step_reads_nothing_but_the_flag_of_the_one_before(
    tmp_path, tiny_checkpoint, tiny_pairs, reads
):
    run_dpo(
        tiny_checkpoint,
        config(tmp_path / "run"),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
    )
    assert [r["step"] for r in records(tmp_path / "run")] == [1, 4, 8, 9]
    assert settled(reads) == {1, 4, 8, 9}, sorted(reads.found.items())
    quiet = {name: n for (step, name), n in reads.found.items() if step in (2, 3, 5, 6, 7)}
    # One fused kernel for all parameters: norm, clipping, step.
    joint = {"aten::_foreach_norm.Scalar", "aten::_foreach_mul_.Tensor", "aten::_fused_adamw_"}
    assert joint <= reads.operators and "aten::linalg_vector_norm" in reads.operators
    # `bool` of the flag counts twice: in Python, and as the operator below it.
    assert set(quiet) <= {"__bool__", "aten::_local_scalar_dense"}


def test_an_sft_step_reads_nothing(tmp_path, tiny_checkpoint, reads):
    rows = [{"prompt": f"say {w}:", "response": f" {w}" * (1 + i % 6)} for i, w in enumerate(WORDS)]
    run_sft(
        tiny_checkpoint,
        config(tmp_path / "run"),
        InstructionDatasetConfig(dataset_name=str(write_jsonl(tmp_path / "a.jsonl", rows))),
    )
    assert settled(reads) == {1, 4, 8, 9}, sorted(reads.found.items())
