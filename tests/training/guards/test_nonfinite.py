"""A NaN in one rank's micro-batch: no byte of the state changes, and its rows are listed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from pathlib import Path

import pytest
import torch

from modern_llm.config.errors import NotFiniteError
from modern_llm.distributed.engine import Engine
from modern_llm.training import loop
from modern_llm.training.guards import nonfinite
from modern_llm.training.tasks.preference import PreferenceTask
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, stage, weights
from tests.training.checkpointing.test_resume import call, same

KINDS = {"ddp": None, "zero0": stage(0), "zero1": stage(1), "zero2": stage(2), "zero3": stage(3)}
BAD = 2  # step, from 0


def state_of(engine) -> str:
    """Return the digest of every weight and moment on this rank."""
    from modern_llm.distributed.optimizer_shards import MOMENTS, base_optimizer, pieces

    digest, optimizer = hashlib.sha256(), base_optimizer(engine)
    for piece in pieces(engine):
        for tensor in (piece.weight, *(piece.moments(optimizer).get(key) for key in MOMENTS)):
            digest.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
    for parameter in engine.inner.parameters():
        # Weights that forwards read. Under ZeRO-3 only this rank's shard: whole ones are temporary.
        parameter = getattr(parameter, "ds_tensor", parameter)
        digest.update(parameter.detach().contiguous().view(-1).float().numpy().tobytes())
    return digest.hexdigest()


class Poison:
    """Makes losses of one rank non-finite at given steps; records the state around each step."""

    def __init__(self, rank: int, steps: set[int], how: str):
        self.rank, self.steps, self.how = rank, steps, how
        self.states: dict[int, tuple[str, str]] = {}

    def __enter__(self):
        self._step, self._run = loop._optimizer_step, PreferenceTask.run
        at = [None, None]

        def step(context, step):
            at[:] = [context.runtime.rank, step]
            before = state_of(context.engine)
            try:
                return self._step(context, step)
            finally:
                self.states[step] = (before, state_of(context.engine))

        def run(task, model, batch):
            result = self._run(task, model, batch)
            if at[0] != self.rank or at[1] not in self.steps:
                return result
            # An infinite loss with a finite gradient, or NaN in both.
            loss = result.loss + math.inf if self.how == "inf" else result.loss * math.nan
            return result._replace(loss=loss)

        loop._optimizer_step, PreferenceTask.run = step, run
        return self

    def __exit__(self, *error):
        loop._optimizer_step, PreferenceTask.run = self._step, self._run


def poisoned(checkpoint: Path, data: Path, case: Case, poison: Poison) -> tuple[str, dict]:
    with poison:
        try:
            dpo(checkpoint, data, case)
            text = "continued"
        except NotFiniteError as error:
            text = str(error)
    return text, poison.states


def every_kind(checkpoint: Path, data: Path, folder: Path) -> dict:
    few = {"max_steps": 4, "save_every": 1}
    found = {}
    for name, zero in KINDS.items():
        for rank, how in ((0, "nan"), (1, "inf")):
            case = Case(folder / f"{name}-{rank}", zero, few)
            found[name, rank] = poisoned(checkpoint, data, case, Poison(rank, {BAD}, how))
        case = Case(folder / f"{name}-skip", zero, few | {"on_nonfinite": "skip"})
        found[name, "skip"] = poisoned(checkpoint, data, case, Poison(1, {BAD}, "nan"))
    return found | device_decides(checkpoint, data, folder)


def device_decides(checkpoint: Path, data: Path, folder: Path) -> dict:
    """The code path of CUDA: the optimizer's kernels skip the step, and the host learns it in the
    next."""
    found = {}
    real = Engine.decides_on_device
    Engine.decides_on_device = True
    for how, more in {"stop": {}, "skip": {"on_nonfinite": "skip"}}.items():
        few = {"max_steps": 4, "save_every": 2, "log_every": 100, **more}
        case = Case(folder / f"device-{how}", None, few)
        found["device", how] = poisoned(checkpoint, data, case, Poison(1, {BAD}, "nan"))
    Engine.decides_on_device = real
    return found


def logged_rarely(checkpoint: Path, data: Path, folder: Path) -> dict[str, tuple]:
    """Return, by kind of run, the steps that one rank logged (only the first and last are due) and
    the log lines about the skip."""
    real_logged, real_decides = loop._is_logged, Engine.decides_on_device
    few = {"max_steps": 7, "log_every": 100, "save_every": 100, "on_nonfinite": "skip"}
    found = {}
    for name, zero in {"ddp": None, "device": None, "zero2": stage(2), "zero3": stage(3)}.items():
        steps, told = set(), Told()

        def noted(context, step, steps=steps):
            if logged := real_logged(context, step):
                steps.add(step)
            return logged

        loop._is_logged = noted
        Engine.decides_on_device = True if name == "device" else real_decides
        with told:
            case = Case(folder / name, zero, few)
            text, _ = poisoned(checkpoint, data, case, Poison(1, {BAD}, "nan"))
        loop._is_logged, Engine.decides_on_device = real_logged, real_decides
        found[name] = (text, sorted(steps), told.lines)
    return found


class Told(logging.Handler):
    """Collects the log lines about steps that were not applied."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> None:
        nonfinite.log.addHandler(self)

    def __exit__(self, *error: object) -> None:
        nonfinite.log.removeHandler(self)


@pytest.mark.slow
def test_a_skipped_step_is_logged_by_all_ranks_although_no_line_is_due(tmp_path, tiny_checkpoint):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    data = write_jsonl(tmp_path / "p.jsonl", transcripts(45))
    ranks = run_ranks(logged_rarely, 2, tiny_checkpoint, data, tmp_path, timeout=250)
    for name in ("ddp", "device", "zero2", "zero3"):
        # On a device that skips a step by itself, the host learns it in the next step.
        at = BAD + 2 if name == "device" else BAD + 1
        for rank, found in enumerate(ranks):
            text, steps, lines = found[name]
            # On every rank, or the sums of a line would wait for a rank without it.
            assert (text, steps) == ("continued", [1, at, 7]), (name, rank)
            assert len(lines) == (rank == 0), "one line, of the rank that writes"
        (line,) = ranks[0][name][2]
        assert "step 3: the loss of micro-batch 0 on rank 1 is nan" in line
        assert [(r["step"], r.get("skipped_steps")) for r in records(tmp_path / name)] == [
            (1, None), (at, 1), (7, 1),
        ]  # fmt: skip


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_no_byte_changes_under_any_sharding_on_any_rank(tmp_path, tiny_checkpoint):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    data = write_jsonl(tmp_path / "p.jsonl", transcripts(45))
    ranks = run_ranks(every_kind, 2, tiny_checkpoint, data, tmp_path, timeout=250)
    assert len(ranks) == 2
    for found in ranks:
        check_device(found, tmp_path)
        for (name, guilty), (text, states) in found.items():
            if name == "device":
                continue
            before, after = states[BAD]
            assert before == after, f"{name}, rank {guilty}: the state has changed"
            assert states[BAD - 1][0] != states[BAD - 1][1], "the steps before change it"
            if guilty == "skip":
                assert text == "continued" and states[BAD + 1][0] != states[BAD + 1][1]
                assert [r.get("skipped_steps") for r in records(tmp_path / f"{name}-skip")] == [
                    None, None, 1, 1,
                ]  # fmt: skip
                continue
            place = tmp_path / f"{name}-{guilty}"
            file = place / f"nonfinite-step-{BAD + 1:08d}.json"
            assert f"step 3: the loss of micro-batch 0 on rank {guilty}" in text, (name, text)
            assert str(file) in text and f"{data}:" in text
            parts = json.loads(file.read_text())["micro_batches"]
            assert {part["rank"] for part in parts if part["loss"] not in ("nan", "inf")} == {
                1 - guilty
            }
            rows = [row for part in parts for row in part["examples"]]
            assert len(rows) == len(set(rows)) == 8, "every example of the step once"
            assert all(row.startswith(f"{data}:") for row in rows)
            outcome = json.loads((place / "outcome.json").read_text())
            assert (outcome["status"], outcome["last_step"]) == (4, BAD)
            newest = max(path.name for path in (place / "checkpoints").iterdir())
            assert newest == f"step-{BAD:08d}", "nothing is saved of the step or after it"
    assert set(ranks[0]) == set(ranks[1]) and len(ranks[0]) == 17


def check_device(found: dict, folder: Path) -> None:
    text, states = found["device", "stop"]
    assert states[BAD][0] == states[BAD][1] == states[BAD + 1][1], "nothing after it was applied"
    assert "step 3: the loss of micro-batch 0 on rank 1 is nan" in text
    newest = max(path.name for path in (folder / "device-stop" / "checkpoints").iterdir())
    assert newest == f"step-{BAD:08d}"
    outcome = json.loads((folder / "device-stop" / "outcome.json").read_text())
    assert outcome["last_step"] == BAD, "the next step had begun, and was not done either"
    text, states = found["device", "skip"]
    assert text == "continued" and states[BAD][0] == states[BAD][1] == states[BAD + 1][0]
    last = records(folder / "device-skip")[-1]
    assert last["step"] == 4 and last["skipped_steps"] == 1
    expected = weights(folder / "ddp-skip")
    for name, tensor in weights(folder / "device-skip").items():
        assert (tensor == expected[name]).all(), name


def test_three_consecutive_skips_stop_a_run(tmp_path, tiny_checkpoint, tiny_pairs):
    call_ = {"on_nonfinite": "skip", "save_every": 1}
    with Poison(0, {2, 3, 5, 6}, "nan"):
        call(tmp_path / "scattered", tiny_checkpoint, tiny_pairs, **call_)
    assert records(tmp_path / "scattered")[-1]["skipped_steps"] == 4
    with (
        Poison(0, {4, 5, 6}, "nan"),
        pytest.raises(NotFiniteError, match="step 7: .* 3 consecutive steps"),
    ):
        call(tmp_path / "row", tiny_checkpoint, tiny_pairs, **call_)
    for place in (tmp_path / "row" / "checkpoints").iterdir():
        assert int(place.name[5:]) <= 6


@pytest.mark.slow
def test_the_count_of_skipped_steps_is_part_of_the_state(tmp_path, tiny_checkpoint, tiny_pairs):
    settings = {"on_nonfinite": "skip", "save_every": 1}
    with Poison(0, {1, 4}, "nan"):
        whole = call(tmp_path / "whole", tiny_checkpoint, tiny_pairs, **settings)
        with broken_at(3), pytest.raises(KeyboardInterrupt):
            call(tmp_path / "broken", tiny_checkpoint, tiny_pairs, **settings)
        assert same(call(tmp_path / "broken", tiny_checkpoint, tiny_pairs, **settings), whole)
    counts = [[r.get("skipped_steps") for r in records(tmp_path / n)] for n in ("whole", "broken")]
    assert counts[0] == counts[1] == [None, 1, 1, 1, 2, 2, 2, 2, 2]


def test_a_nonfinite_gradient_with_finite_losses_is_reported(tmp_path, tiny_checkpoint, tiny_pairs):
    real = PreferenceTask.run

    def run(task, model, batch):
        result = real(task, model, batch)
        # Finite forward, infinite backward: the square root at 0.
        zero = (result.loss - result.loss.detach()).abs()
        return result._replace(loss=result.loss + torch.sqrt(zero))

    PreferenceTask.run = run
    try:
        with pytest.raises(
            NotFiniteError, match="step 1: the gradient is not finite .* every loss"
        ):
            call(tmp_path / "run", tiny_checkpoint, tiny_pairs)
    finally:
        PreferenceTask.run = real
    file = tmp_path / "run" / "nonfinite-step-00000001.json"
    assert (
        len([r for p in json.loads(file.read_text())["micro_batches"] for r in p["examples"]]) == 4
    )
