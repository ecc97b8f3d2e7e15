"""A run of three epochs, stopped after steps and resumed: same data order, same weights."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.config.errors import Stopped
from modern_llm.training import loop
from modern_llm.training.train_sft import run_sft
from tests.helpers.text import WORDS, make_checkpoint, write_jsonl

STEPS, EPOCHS, BATCH = 60, 3, 4


class Run:
    """SFT with dropout on 80 answers, which records the rows of every step."""

    def __init__(self, folder: Path, model: Path, answers: Path):
        self.folder, self._model, self._answers = folder, model, answers
        self.order: list[str] = []

    def go(self, stop_after: int | None) -> Path | None:
        """Run to the end, or until a signal in step `stop_after`; return the final model."""
        real = loop._optimizer_step

        def noted(context, step):
            result = real(context, step)
            rows = b"".join(b.ids.numpy().tobytes() for b in context.task.micro_batches(step))
            self.order.append(f"{step} {hashlib.sha256(rows).hexdigest()}")
            if step + 1 == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        loop._optimizer_step = noted
        try:
            return run_sft(
                self._model,
                TrainingConfig(
                    run_name="s", output_dir=self.folder, batch_size=BATCH, epochs=EPOCHS,
                    log_every=1, save_every=1000, learning_rate=1e-3,
                ),
                InstructionDatasetConfig(dataset_name=str(self._answers)),
            )  # fmt: skip
        except Stopped as stopped:
            assert stop_after is not None and f"after step {stop_after}, saved" in str(stopped)
            return None
        finally:
            loop._optimizer_step = real

    def end(self, final: Path | None) -> tuple:
        assert final is not None and len(self.order) == STEPS
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        numbers = [(r["step"], r["loss"], r["grad_norm"]) for r in map(json.loads, lines)]
        weights = hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest()
        return weights, numbers, self.order


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_tokenizer) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("answers")
    model = make_checkpoint(folder / "model", tiny_tokenizer, n_layers=1, dropout=0.2)
    rows = [
        {
            "prompt": f"say {WORDS[i % len(WORDS)]} {i}:",
            "response": f" {WORDS[i % 7]}" * (1 + i % 6),
        }
        for i in range(STEPS * BATCH // EPOCHS)
    ]
    return model, write_jsonl(folder / "answers.jsonl", rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, inputs) -> tuple:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", *inputs)
    end = run.end(run.go(None))
    assert len({line.split()[1] for line in run.order}) == STEPS, "epochs differ in their order"
    return end


@pytest.mark.slow
def test_one_run_stopped_ten_times(tmp_path, inputs, undisturbed):
    run = Run(tmp_path / "run", *inputs)
    for stop in (1, 7, 19, 20, 21, 33, 40, 41, 58, 59):
        assert run.go(stop) is None
    assert run.end(run.go(None)) == undisturbed


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_after_each_step(stop, tmp_path, inputs, undisturbed):
    run = Run(tmp_path / "run", *inputs)
    assert run.go(stop) is None
    assert run.end(run.go(None)) == undisturbed


@pytest.mark.long
def test_one_run_stopped_after_every_step(tmp_path, inputs, undisturbed):
    run = Run(tmp_path / "run", *inputs)
    for stop in range(1, STEPS):
        assert run.go(stop) is None
    assert run.end(run.go(None)) == undisturbed
