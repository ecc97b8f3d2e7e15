"""Running out of memory halves the token budget: the step is repeated, with the same results."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.distributed.engine import Engine
from modern_llm.models.out_of_memory import is_out_of_memory
from modern_llm.setup import micro_batches
from modern_llm.training import loop
from modern_llm.training.guards import memory as token_budget
from modern_llm.training.tasks.preference import PreferenceTask
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.steps import broken_at


class LittleMemory:
    """Forwards and backwards of more than `tokens` run out of memory.

    Args:
        first: micro-batches of each step that always fit: their gradients must be discarded.
        steps: steps (from 0) with little memory; default: all.
    """

    def __init__(self, tokens: int, *, first: int = 0, rank: int = 0, steps: range = range(99)):
        self.tokens, self.first, self.rank, self.steps = tokens, first, rank, steps
        self.ran_out: list[int] = []
        self.areas: list[tuple[int, int]] = []

    def __enter__(self):
        self._run, self._step = PreferenceTask.run, loop._optimizer_step
        at = {"rank": 0, "step": 0, "batch": 0}

        def step(context, number):
            at.update(rank=context.runtime.rank, step=number, batch=0)
            return self._step(context, number)

        def run(task, model, batch):
            result = self._run(task, model, batch)
            if not model.training:
                return result
            at["batch"] += 1
            self.areas.append((at["step"], batch.area))
            here = at["rank"] == self.rank and at["step"] in self.steps
            if here and batch.area > self.tokens and at["batch"] > self.first:
                self.ran_out.append(at["step"])
                at["batch"] = 0
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return result

        PreferenceTask.run, loop._optimizer_step = run, step
        return self

    def __exit__(self, *error):
        PreferenceTask.run, loop._optimizer_step = self._run, self._step


def call(folder: Path, checkpoint: Path, pairs: Path, **changes) -> list[dict]:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 8, "max_steps": 6, "log_every": 1,
        "save_every": 2, "learning_rate": 1e-3,
    }  # fmt: skip
    run_dpo(
        checkpoint,
        TrainingConfig(**(fields | changes)),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def learnt(records: list[dict]) -> torch.Tensor:
    return torch.tensor([[r["loss"], r["grad_norm"], r["rewards/margins"]] for r in records])


def near(records: list[dict], expected: list[dict]) -> bool:
    return torch.allclose(learnt(records), learnt(expected), rtol=2e-4, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def begun_with():
    """A step of these pairs is one forward at first, on any machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(micro_batches.AUTO_TOKENS, "cpu", 1024)
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_checkpoint, tiny_pairs):
    return call(tmp_path_factory.mktemp("plain") / "run", tiny_checkpoint, tiny_pairs)


def test_a_step_is_repeated_in_smaller_forwards(
    tmp_path, tiny_checkpoint, tiny_pairs, plain, caplog
):
    assert len({r["loss"] for r in plain}) == 6
    assert not any("tokens_per_micro_batch" in r for r in plain)
    with LittleMemory(300) as memory, caplog.at_level(logging.INFO, "modern_llm"):
        found = call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert memory.ran_out == [0, 0], "halved twice"
    assert "auto, 1024 tokens a forward (to begin with)" in caplog.text
    assert "out of memory in step 1 with" in caplog.text
    budget = found[0]["tokens_per_micro_batch"]
    assert budget < 300 and {r["tokens_per_micro_batch"] for r in found} == {budget}
    assert all(area <= budget for _, area in memory.areas[2:])
    assert near(found, plain)


def test_gradients_from_before_memory_ran_out_are_discarded(
    tmp_path, tiny_checkpoint, tiny_pairs, plain
):
    """Only the third micro-batch of one step fails, and again in smaller forwards."""
    start = {"micro_batch_size": 2}
    with LittleMemory(150, first=2, steps=range(2, 3)) as memory:
        found = call(tmp_path / "run", tiny_checkpoint, tiny_pairs, **start)
    assert set(memory.ran_out) == {2} and len(memory.ran_out) >= 1
    assert near(found, plain)


def test_a_resumed_run_uses_the_stored_budget(tmp_path, tiny_checkpoint, tiny_pairs, plain, caplog):
    with LittleMemory(300), broken_at(4), pytest.raises(KeyboardInterrupt):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    with LittleMemory(300) as memory, caplog.at_level(logging.INFO, "modern_llm"):
        # The memory of a forward is unchanged, so the stored budget is used.
        found = call(tmp_path / "run", tiny_checkpoint, tiny_pairs, hang_timeout=500.0)
    assert memory.ran_out == [] and "a forward (found before)" in caplog.text
    assert len(found) == 6 and near(found, plain)
    note = json.loads((tmp_path / "run" / token_budget.FILE).read_text())
    assert note["step"] == 1 and note["tokens_per_micro_batch"] < 300


def test_other_settings_search_again(tmp_path, tiny_checkpoint, tiny_pairs):
    with LittleMemory(300):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=1)
    with LittleMemory(2000) as memory:
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=1, resume="auto")
    assert not memory.areas, "the run was finished"
    (tmp_path / "run" / "outcome.json").unlink()
    with LittleMemory(2000) as memory:
        call(
            tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=1, gradient_checkpointing=True
        )
    assert max(area for _, area in memory.areas) > 300


def test_a_damaged_file_is_ignored(tmp_path, tiny_checkpoint, tiny_pairs, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / token_budget.FILE).write_text('{"tokens_per_micro_batch": "many"}')
    call(tmp_path / "run", tiny_checkpoint, tiny_pairs, max_steps=1)
    assert "token_budget.json: cannot be read and is left out (ValueError)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"out of memory in step 1: train.tokens_per_micro_batch auto is down to \d+ tokens, "
            r"and the longest example \(.*pairs.jsonl:\d+\) takes \d+: set train.gradient_ch",
        ),
        (
            {"tokens_per_micro_batch": 400},
            r"out of memory in step 1 with train.tokens_per_micro_batch 400: lower it, set it to "
            r"auto, or .* \(CUDA out of memory\)",
        ),
    ],
)
def test_a_forward_that_cannot_be_smaller_is_an_error(
    tmp_path, tiny_checkpoint, tiny_pairs, changes, message
):
    with LittleMemory(0), pytest.raises(UserError, match=message):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs, **changes)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_if_a_step_cannot_be_repeated_the_next_start_uses_half(
    tmp_path, tiny_checkpoint, tiny_pairs, plain, monkeypatch
):
    """As under DeepSpeed, which communicates within a backward."""
    monkeypatch.setattr(Engine, "recovers", False)
    text = r"memory in step 4: .* run the same command again, it resumes with (\d+) tokens"
    with LittleMemory(400, steps=range(3, 99)), pytest.raises(UserError, match=text) as error:
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    with LittleMemory(400) as memory:
        found = call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert memory.ran_out == [] and memory.areas[0][0] == 2
    budget = int(re.search(text, str(error.value))[1])
    assert found[-1]["tokens_per_micro_batch"] == budget < 800
    assert len(found) == 6 and near(found, plain)


def test_another_error_is_not_taken_for_out_of_memory(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    def run(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(PreferenceTask, "run", run)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    assert is_out_of_memory(RuntimeError("[enforce fail] can't allocate memory: 9 bytes"))


def test_a_budget_depends_on_how_many_processes_share_rows_and_earlier_ones_are_read():
    runtime = SimpleNamespace(device=torch.device("cpu"))

    def digest(**train) -> str:
        return token_budget._circumstances(runtime, SimpleNamespace(record={"train": train}))

    assert digest(batch_size=4) == digest(batch_size=4, sequence_parallel=1)
    assert digest(batch_size=4) != digest(batch_size=4, sequence_parallel=2)
