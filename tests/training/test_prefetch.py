"""Prefetched batches equal those built in turn: order, errors, budget, and no thread left."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import Stopped
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.training import loop
from modern_llm.training.prefetch import Prefetch
from modern_llm.training.train_dpo import DPOConfig, run_dpo

CPU = torch.device("cpu")


class Numbers:
    """A task whose batches are numbers; records the thread that built them."""

    def __init__(self, breaks_at: int = -1):
        self.budget = SimpleNamespace(tokens=100)
        self.made: list[tuple[int, int, str]] = []
        self.breaks_at, self.began = breaks_at, {step: threading.Event() for step in range(9)}
        self.consumed, self.later = "the task's own", {}

    def micro_batches(self, step):
        self.made.append((step, self.budget.tokens, threading.current_thread().name))
        self.began[step].set()
        if step == self.breaks_at:
            raise LookupError(f"row of step {step}")
        return (step * 10 + at for at in range(2))

    def denominator(self, step):
        return float(step)

    def ready(self, step):
        return step not in self.later


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("batches")]


def test_each_step_gets_its_batches_and_the_next_ones_are_built_meanwhile():
    task = Numbers()
    with Prefetch(task, CPU, 4) as ahead:
        assert not task.made
        for step in range(4):
            assert ahead.micro_batches(step) == [step * 10, step * 10 + 1]
            assert ahead.denominator(step) == step
            # Built although nothing has requested it yet.
            assert step == 3 or task.began[step + 1].wait(10)
        assert ahead.consumed == "the task's own" and workers()
    assert [step for step, _, _ in task.made] == [0, 1, 2, 3], "none beyond the last step"
    assert all(name.startswith("batches") for _, _, name in task.made)
    assert not workers()


def test_the_first_step_of_another_window_is_not_built_in_advance():
    task = Numbers()
    task.later = {2}
    with Prefetch(task, CPU, 4) as ahead:
        ahead.micro_batches(0)
        ahead.micro_batches(1)
        assert not task.began[2].wait(0.2)
        assert ahead.micro_batches(2) == [20, 21] and task.began[3].wait(10)


def test_an_error_is_raised_by_the_step_that_needs_the_batch():
    task = Numbers(breaks_at=2)
    with (
        pytest.raises(LookupError, match="row of step 2") as error,
        Prefetch(task, CPU, 9) as ahead,
    ):
        ahead.micro_batches(0)
        assert ahead.micro_batches(1) == [10, 11] and task.began[2].wait(10)
        assert ahead.denominator(1) == 1.0
        ahead.micro_batches(2)
    names = [frame.name for frame in error.traceback]
    assert "micro_batches" in names and "_work" in names, "where it happened is told"
    assert not workers()


def test_a_repeated_step_gets_smaller_forwards_and_so_does_the_next():
    task = Numbers()
    with Prefetch(task, CPU, 3) as ahead:
        ahead.micro_batches(0)
        assert task.began[1].wait(10)
        task.budget.tokens = 50
        for step in range(3):
            ahead.micro_batches(step)
    for step in range(3):
        assert [tokens for at, tokens, _ in task.made if at == step][-1] == 50, task.made


def test_batches_for_a_gpu_are_pinned_by_the_thread(monkeypatch):
    set_on = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda at: set_on.append((at, threading.current_thread().name))
    )
    task = Numbers()
    task.micro_batches = lambda step: [SimpleNamespace(pin=lambda: f"pinned {step}")]
    device = torch.device("cuda", 1)
    with Prefetch(task, device, 2) as ahead:
        assert ahead.micro_batches(0) == ["pinned 0"]
    assert [at for at, _ in set_on] == [device] and set_on[0][1].startswith("batches")


def call(folder, checkpoint, pairs, **changes):
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 4, "max_steps": 6, "log_every": 1,
        "save_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    return run_dpo(
        checkpoint,
        TrainingConfig(**(fields | changes)),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )


def records(folder) -> list[dict]:
    drawn = {"elapsed_s", "tokens_per_second", "memory_gb", "mfu"}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in drawn} for line in lines]


class InTurn(Prefetch):
    """The same without a thread."""

    def micro_batches(self, step):
        return self._task.micro_batches(step)


@pytest.mark.slow
def test_runs_are_the_same_to_the_bit_and_leave_no_thread_however_they_end(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    call(tmp_path / "ahead", tiny_checkpoint, tiny_pairs)
    assert not workers()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Prefetch", InTurn)
        call(tmp_path / "turn", tiny_checkpoint, tiny_pairs)
    assert records(tmp_path / "ahead") == records(tmp_path / "turn")
    real = BatchSource.micro_batches
    with monkeypatch.context() as patch:

        def breaks(source, step):
            if step == 3:
                raise LookupError("a damaged row")
            return real(source, step)

        patch.setattr(BatchSource, "micro_batches", breaks)
        with pytest.raises(LookupError, match="a damaged row"):
            call(tmp_path / "broken", tiny_checkpoint, tiny_pairs)
    assert records(tmp_path / "broken") == records(tmp_path / "turn")[:3] and not workers()
    with monkeypatch.context() as patch:
        asked = loop.stop_asked

        def stop(runtime):
            if loop.heartbeat.here.step == 5:
                runtime.stopping = "a test"
            return asked(runtime)

        patch.setattr(loop, "stop_asked", stop)
        with pytest.raises(Stopped):
            call(tmp_path / "broken", tiny_checkpoint, tiny_pairs)
    assert not workers()
    call(tmp_path / "broken", tiny_checkpoint, tiny_pairs)
    assert records(tmp_path / "broken") == records(tmp_path / "turn")
