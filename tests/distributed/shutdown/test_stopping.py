"""A signal or the file STOP in any phase: all processes stop there together, with status 75.

The same call then ends like an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from modern_llm import cli
from modern_llm.config import TrainingConfig
from modern_llm.config.errors import Stopped
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table import build
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.consensus import Rounds
from modern_llm.distributed.shutdown.signals import StopRequest, heard, stop_here
from modern_llm.inference import generate
from modern_llm.reference.scoring import Scoring
from modern_llm.training import loop
from modern_llm.training.checkpointing import format
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks

# phase -> message, and whether the first process gets the signal (otherwise the last).
PLACES = {
    "reading": ("while it read the data", True),
    "scoring": ("in the reference pass, whose values so far are stored", False),
    "step": ("after step 4, saved", False),
    "evaluation": ("after step 4, saved", False),
    "answers": ("after step 3, saved", False),
    "first answers": ("while it answered prompts", False),
    "saving": ("after step 3, saved", False),
    "last evaluation": ("after step 6, saved", False),
}
WHERE = {
    "reading": (build, "in_batches"),
    "scoring": (Scoring, "_forward"),
    "step": (loop, "_optimizer_step"),
    "evaluation": (loop, "_evaluate"),
    "last evaluation": (loop, "_evaluate"),
    "answers": (generate._CheckEachToken, "__call__"),
    "first answers": (generate._CheckEachToken, "__call__"),
    "saving": (format, "save"),
}


def call(folder: Path, model: Path, pairs: Path) -> Path:
    return run_dpo(
        model,
        TrainingConfig(
            run_name="r", output_dir=folder / "run", batch_size=4, max_steps=6, log_every=2,
            save_every=2, eval_every=4, generate_every=3, generate_tokens=5, learning_rate=1e-3,
            tokens_per_micro_batch=200,
        ),
        DPOConfig(max_length=96, flush_every=8),
        PreferenceDatasetConfig(dataset_name=str(pairs), eval_fraction=0.3),
    )  # fmt: skip


def due(place: str, seen: int, args: tuple) -> bool:
    """Whether the signal comes in this call of the patched function."""
    if place == "step":
        return args[1] == 3
    if place == "saving":
        return args[2] == 2
    if place.endswith("answers"):
        return seen == (2 if place == "first answers" else 7)  # 5 tokens before the first step
    if place.endswith("evaluation"):
        return args[2] == (6 if place == "last evaluation" else 4)
    return seen == {"reading": 1, "scoring": 3}[place]


def asked_at(place: str, numbers: tuple[int, ...]):
    """Patch the function so that this process gets the signals once; return the undo function."""
    owner, name = WHERE[place]
    real, seen = getattr(owner, name), [0]

    def patched(*args, **kwargs):
        seen[0] += 1
        if due(place, seen[0], args):
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
        return real(*args, **kwargs)

    setattr(owner, name, patched)
    return lambda: setattr(owner, name, real)


def end_of(folder: Path, final: Path) -> tuple:
    """Return the results that must not depend on who is asked to stop, and when."""
    drawn = ("elapsed_s", "tokens_per_second", "memory_gb", "mfu")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in drawn} for line in lines]
    samples = (folder / "run" / "samples.jsonl").read_text()
    return (
        hashlib.sha256((final / "model.safetensors").read_bytes()).hexdigest(),
        [list(record.items()) for record in records],
        samples,
    )


def forwards() -> list[int]:
    """Count the forwards of the reference pass from here."""
    count, real = [0], Scoring._forward

    def counted(scoring, trees, group):
        count[0] += len(group) > 0
        return real(scoring, trees, group)

    Scoring._forward = counted
    return count


def every_place(
    folder: Path, model: Path, pairs: Path, places: tuple[str, ...]
) -> dict[str, tuple]:
    """On one rank: an uninterrupted run, then one that is stopped in each phase and resumed."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    count, found = forwards(), {}
    for place in ("nowhere", *places):
        os.environ["MODERN_LLM_CACHE"] = str(folder / place / "cache")
        message, status, tables = "", None, False
        count[0] = 0
        if place != "nowhere":
            victim = 0 if PLACES[place][1] else world - 1
            numbers = (signal.SIGTERM,) * 2 if place == "saving" else (signal.SIGUSR1,)
            undo = asked_at(place, numbers) if rank == victim else lambda: None
            try:
                call(folder / place, model, pairs)
            except Stopped as stopped:
                message = str(stopped)
            finally:
                undo()
            if rank == 0:
                status = json.loads((folder / place / "run" / "outcome.json").read_text())
                tables = (folder / place / "run" / "data").exists()
        final = call(folder / place, model, pairs)
        end = end_of(folder / place, final) if rank == 0 else None
        found[place] = (message, status and status["status"], tables, end, count[0])
    if world == 2:
        found["rounds"] = rounds([2, 6]), rounds([7, 3]), rounds([9, 5])
    return found


def rounds(lengths: list[int]) -> tuple[int, str]:
    """On one rank: a loop with its own length; rank 1 gets a signal in its 4th round."""
    rank = int(os.environ["RANK"])
    about = SimpleNamespace(process_index=rank, num_processes=2, device="cpu")
    done, runtime = 0, Runtime(about, None)  # type: ignore[arg-type]
    with StopRequest():
        try:
            loop_ = Rounds(runtime, "here")
            for done in range(1, lengths[rank] + 1):
                if rank == 1 and done == 4:
                    os.kill(os.getpid(), signal.SIGUSR1)
                loop_.check()
            loop_.finish()
        except Stopped as stopped:
            return done, str(stopped)
    return done, ""


def expect_rounds(first: tuple, second: tuple) -> None:
    """Loops of different lengths end together, also for the process that has already finished."""
    words = "stopped by SIGUSR1 here; run the same command to resume"
    assert first == ((2, words), (7, ""), (4, words))
    assert second == ((4, words), (3, ""), (4, words))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "places"),
    [(1, tuple(PLACES)), (2, ("reading", "scoring", "evaluation", "first answers"))],
)
def test_all_stop_in_any_phase_and_the_same_call_resumes(
    world, places, tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    monkeypatch.setattr(Scoring, "_forward", Scoring._forward)  # counted in this process
    arguments = (tmp_path, tiny_checkpoint, tiny_pairs, places)
    if world == 1:
        results = [every_place(*arguments)]
    else:
        results = run_ranks(every_place, world, *arguments, timeout=250)
    if world == 2:
        expect_rounds(*(result["rounds"] for result in results))
    expected = results[0]["nowhere"][3]
    for place in places:
        words, _ = PLACES[place]
        messages = [result[place][0] for result in results]
        name = "SIGTERM" if place == "saving" else "SIGUSR1"
        assert messages == [f"stopped by {name} {words}; run the same command to resume"] * world
        _, status, tables, end, _ = results[0][place]
        assert status == 75 and tables == (place != "reading"), place
        assert end == expected, place
        if place == "scoring":
            # Answers that were scored before the stop are not scored again, and none is missing.
            scored = [sum(result[p][4] for result in results) for p in (place, "nowhere")]
            assert scored[0] == scored[1]


def test_only_rank_0_reads_the_file_stop_and_an_old_one_has_no_effect(tmp_path):
    stop = tmp_path / "STOP"
    with StopRequest(stop):
        assert heard(main=True) is None
        stop.touch()
        assert heard(main=True) == "the file STOP" and heard(main=False) is None
        with pytest.raises(Stopped, match="stopped by the file STOP here; run the same command"):
            stop_here("here")


def test_a_second_interrupt_ends_at_once_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as outer, StopRequest():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert outer.asked == heard(main=False) == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
    assert heard(main=True) is None


@pytest.mark.parametrize("verb", ["score", "evaluate", "generate", "reference fill"])
def test_long_verbs_stop_with_75_and_one_line(verb, tmp_path, tiny_checkpoint, tiny_pairs, capsys):
    options = ["--data", str(tiny_pairs), "--model", str(tiny_checkpoint), "--max_length", "96"]
    if verb == "score":
        options += ["--output", str(tmp_path / "out.jsonl")]
    if verb == "generate":
        options = ["--model", str(tiny_checkpoint), "--prompt", "the", "--max_new_tokens", "40"]
    if verb == "reference fill":
        options = ["--sft_checkpoint", str(tiny_checkpoint), "--dpo.max_length", "96"]
        options += ["--train.run_name", "x", "--train.output_dir", str(tmp_path / "run")]
        options += ["--data.dataset_name", str(tiny_pairs), "--dpo.flush_every", "4"]
    undo = asked_at("first answers" if verb == "generate" else "scoring", (signal.SIGTERM,))
    try:
        status = cli.main([*verb.split(), *options])
    finally:
        undo()
    captured = capsys.readouterr()
    assert status == 75, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("modern-llm: error")]
    assert len(errors) == 1 and "stopped by SIGTERM" in errors[0], captured.err
    assert "Traceback" not in captured.err and not (tmp_path / "out.jsonl").exists()
    assert cli.main([*verb.split(), *options]) == 0


def test_a_stale_build_lock_is_named_at_start(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch, caplog
):
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr("modern_llm.distributed.build_locks.oldest_compiler", lambda: None)
    with StopRequest() as request:
        request.asked = "SIGTERM"
        with pytest.raises(Stopped, match="before it began"):
            call(tmp_path, tiny_checkpoint, tiny_pairs)
    (line,) = [r.getMessage() for r in caplog.records if "build locks" in r.getMessage()]
    assert str(lock) in line and f"remove {lock}" in line
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["status"] == 75
