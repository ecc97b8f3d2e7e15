"""Callbacks: every method at its place, requests that all ranks follow, errors, best and early
stopping."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

import modern_llm as ml
from modern_llm.export.checkpoint import export_checkpoint
from modern_llm.training import loop
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import transcripts, write_jsonl

STEPS = 8


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pairs")
    train = write_jsonl(folder / "train.jsonl", transcripts(40, seed=3))
    return str(train), str(write_jsonl(folder / "held_out.jsonl", transcripts(9, seed=4)))


def call(folder: Path, model: Path, pairs: tuple[str, str], callbacks: Any = (), **changes) -> Path:
    fields = {
        "batch_size": 4, "max_steps": STEPS, "log_every": 3, "eval_every": 2, "save_every": 100,
        "learning_rate": 1e-3, "max_length": 64, "schedule": "constant",
    }  # fmt: skip
    options = fields | changes
    return ml.dpo(
        model, pairs[0], eval_data=pairs[1], output_dir=folder, callbacks=callbacks, **options
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "outcome.json").read_text())


class Noting:
    """Notes every call, and asks for what a table names: (method, step) -> request."""

    def __init__(self, asks: dict[tuple[str, int], str] | None = None, only: int | None = None):
        self.calls: list[tuple] = []
        self._asks, self._only = asks or {}, only

    def _note(self, name: str, state: ml.TrainState, control: ml.Control, *more: Any) -> None:
        self.calls.append((name, state.step, *more))
        request = self._asks.get((name, state.step))
        if request and self._only in (None, state.rank):
            getattr(control, request)()

    def on_train_begin(self, state, control):
        assert type(state.model).__name__ == "LlamaForCausalLM" and state.optimizer.param_groups
        self._note("begin", state, control)

    def on_step_end(self, state, control):
        self._note("step", state, control)

    def on_log(self, state, control, metrics):
        self._note("log", state, control, round(metrics["loss"], 6))

    def on_evaluate(self, state, control, metrics):
        assert metrics["eval/loss"] > 0
        self._note("evaluate", state, control)

    def on_checkpoint(self, state, control, folder):
        assert (folder / "MANIFEST.json").is_file()
        self._note("checkpoint", state, control, folder.name)

    def on_train_end(self, state, control):
        self._note("end", state, control)


def test_every_method_is_called_at_its_place(tmp_path, tiny_checkpoint, pairs):
    noting = Noting()
    call(tmp_path, tiny_checkpoint, pairs, [noting], save_every=5)
    logged = {r["step"]: round(r["loss"], 6) for r in records(tmp_path) if "loss" in r}
    expected: list[tuple] = [("begin", 0)]
    for step in range(1, STEPS + 1):
        expected.append(("step", step))
        if step in (1, 3, 6, 8):
            expected.append(("log", step, logged[step]))
        if step % 2 == 0:
            expected.append(("evaluate", step))
        if step == 5:
            expected.append(("checkpoint", 5, "step-00000005"))
    assert noting.calls == [*expected, ("end", 8)]


def asked_on_two(folder: Path, model: Path, pairs: tuple[str, str]) -> list[tuple]:
    import torch.distributed as dist

    asks = {("step", 1): "evaluate", ("log", 3): "save", ("evaluate", 4): "stop"}
    noting = Noting(asks, only=1)
    call(folder, model, pairs, [noting], tokens_per_micro_batch=300)
    assert dist.get_world_size() == 2
    return noting.calls


@pytest.mark.slow
def test_one_ranks_requests_are_followed_by_all_at_the_same_step(tmp_path, tiny_checkpoint, pairs):
    one, two = run_ranks(asked_on_two, 2, tmp_path, tiny_checkpoint, pairs, timeout=200)
    assert one == two
    kinds = [(name, step) for name, step, *_ in one]
    assert [s for n, s in kinds if n == "evaluate"] == [1, 2, 4]
    assert [s for n, s in kinds if n == "checkpoint"] == [3]
    assert kinds[-1] == ("end", 4) and (tmp_path / "dpo_final" / "config.json").is_file()
    # The last line of an ended run is that of its last step.
    assert [r["step"] for r in records(tmp_path) if "loss" in r] == [1, 3, 4]
    assert outcome(tmp_path) == {"status": 0, "reason": "done: a callback asked", "last_step": 4}


def test_an_error_ends_the_run_with_its_traceback(tmp_path, tiny_checkpoint, pairs):
    class Broken(ml.Callback):
        def on_log(self, state, control, metrics):
            raise KeyError("no such thing")

    with pytest.raises(KeyError) as raised:
        call(tmp_path, tiny_checkpoint, pairs, [Broken()])
    assert raised.value.__notes__ == ["raised by Broken.on_log at step 1"]
    assert any(entry.name == "on_log" for entry in raised.traceback)
    assert outcome(tmp_path)["status"] == 1


class Misspelt:
    def on_step_ended(self, state, control):
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (Misspelt(), r"Misspelt.on_step_ended is never called \(did you mean on_step_end\?\)"),
        (object(), "object has no method of a callback"),
        (Noting, "Noting is a class: give an object"),
        (EarlyStoppingCallback(), "set train.early_stopping_patience"),
        (
            type("Sub", (TrainerCallback,), {"on_substep_end": lambda *a, **k: None})(),
            "Sub.on_substep_end is not among the events",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_training(
    tmp_path, tiny_checkpoint, pairs, callback, message
):
    with pytest.raises(ml.UserError, match=message):
        call(tmp_path, tiny_checkpoint, pairs, [callback])
    assert not (tmp_path / "metrics.jsonl").exists()


class OfTheTrainer(TrainerCallback):
    """Written for `transformers.Trainer`."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append(("begin", args.learning_rate, state.max_steps, type(model).__name__))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(("log", state.global_step, sorted(logs)[:1]))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(("evaluate", state.global_step, "eval_loss" in metrics))
        control.should_training_stop = state.global_step == 4
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seen.append(("epoch", state.global_step))

    def on_save(self, args, state, control, **kwargs):
        self.seen.append(("save", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            control.should_save = True
        with pytest.raises(AttributeError, match=r"args.deepspeed: a callback of transformers"):
            args.deepspeed  # noqa: B018


def test_a_callback_of_the_trainer_works(tmp_path, tiny_checkpoint, pairs):
    theirs = OfTheTrainer()
    call(tmp_path, tiny_checkpoint, pairs, [theirs], batch_size=20)
    assert theirs.seen == [
        ("begin", 1e-3, STEPS, "LlamaForCausalLM"),
        ("log", 1, ["grad_norm"]),
        ("epoch", 2),
        ("evaluate", 2, True),
        ("log", 3, ["grad_norm"]),
        ("save", 3),
        ("epoch", 4),
        ("evaluate", 4, True),
        ("log", 4, ["grad_norm"]),  # the last line of the run
    ]
    assert outcome(tmp_path)["reason"] == "done: OfTheTrainer"


def evaluations(monkeypatch, values: dict[int, float]) -> None:
    """Let the evaluation after a step have this loss."""
    real = loop._evaluate

    def told(context, monitor, step):
        return real(context, monitor, step) | {"eval/loss": values[step]}

    monkeypatch.setattr(loop, "_evaluate", told)


LOSSES = {2: 0.6, 4: 0.4, 6: 0.5, 8: 0.7, 10: 0.8, 12: 0.3}


def test_the_best_is_kept_and_patience_ends_the_run(tmp_path, tiny_checkpoint, pairs, monkeypatch):
    evaluations(monkeypatch, LOSSES)
    fields = {"max_steps": 12, "save_every": 3, "keep_checkpoints": 1}
    follows = {"keep_best": True, "early_stopping_patience": 3}
    final = call(tmp_path / "run", tiny_checkpoint, pairs, **fields, **follows)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000009"]
    found = outcome(tmp_path / "run")
    assert found["last_step"] == 10 and found["reason"] == (
        "done: 3 evaluations since the best, eval/loss 0.4 at step 4"
    )
    # `best` is a checkpoint argument: the model that step 4 ended with.
    four = call(tmp_path / "four", tiny_checkpoint, pairs, **(fields | {"max_steps": 4}))
    export_checkpoint(str(tmp_path / "run" / "best"), tmp_path / "best")
    one, two = (load_file(p / "model.safetensors") for p in (tmp_path / "best", four))
    assert all((one[name] == two[name]).all() for name in two)
    last = load_file(final / "model.safetensors")
    assert any((one[name] != last[name]).any() for name in last)


@pytest.mark.slow
@pytest.mark.parametrize("stop_before", [5, 9])
def test_a_resumed_run_stops_where_an_uninterrupted_one_does(
    tmp_path, tiny_checkpoint, pairs, monkeypatch, stop_before
):
    evaluations(monkeypatch, LOSSES)
    fields = {"max_steps": 12, "save_every": 3, "keep_best": True, "early_stopping_patience": 3}
    call(tmp_path / "whole", tiny_checkpoint, pairs, **fields)
    with broken_at(stop_before), pytest.raises(KeyboardInterrupt):
        call(tmp_path / "broken", tiny_checkpoint, pairs, **fields)
    call(tmp_path / "broken", tiny_checkpoint, pairs, **fields)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "whole")
    numbers = [
        [{k: r.get(k) for k in ("step", "loss", "eval/loss", "grad_norm")} for r in records(folder)]
        for folder in (tmp_path / "whole", tmp_path / "broken")
    ]
    assert numbers[0] == numbers[1]


def test_following_evaluations_needs_evaluation_data(tmp_path, tiny_checkpoint, pairs):
    with pytest.raises(ml.UserError, match=r"train.keep_best needs evaluation data: set data\.ev"):
        ml.dpo(tiny_checkpoint, pairs[0], output_dir=tmp_path, max_length=64, keep_best=True)
