"""No memory leaks: many runs in one process, and many steps in one run."""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.evaluation import score
from modern_llm.models.head import FusedHead
from modern_llm.reference.reference_pass import ReferencePass
from modern_llm.training import loop
from modern_llm.training.run import outcome
from modern_llm.training.run.dry_run import DryRun
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="threads and memory are listed by Linux alone"
)
WARM = 3
"""First runs, after which all caches are filled."""


@dataclass(frozen=True)
class Held:
    """Memory and objects of a process."""

    threads: int
    descriptors: int
    temporary: int
    objects: int
    handlers: int
    megabytes: float

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            threads=len(os.listdir("/proc/self/task")),
            descriptors=len(os.listdir("/proc/self/fd")),
            temporary=len(os.listdir(tempfile.gettempdir())),
            objects=len(gc.get_objects()),
            handlers=len(logging.getLogger("modern_llm").handlers),
            megabytes=pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        )


def check_flat(held: list[Held], megabytes: float, objects: int) -> None:
    """The last measurement equals the first, up to so many megabytes and objects."""
    first, last = held[0], held[-1]
    assert last.threads <= first.threads, held
    assert last.descriptors <= first.descriptors, held
    assert last.temporary <= first.temporary, held
    assert last.handlers <= first.handlers, held
    assert last.objects - first.objects <= objects, held
    assert last.megabytes - first.megabytes <= megabytes, held


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    shape = {"n_layers": 1, "d_model": 16, "n_heads": 2, "gqa_groups": 1}
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"), **shape)
    return checkpoint, write_jsonl(folder / "pairs.jsonl", transcripts(12))


def train(
    inputs: tuple[Path, Path],
    folder: Path,
    reference: str = "cache",
    dry_run: DryRun | None = None,
    in_memory: bool = False,
    **changes: Any,
) -> None:
    checkpoint, pairs = inputs
    data: Any = PreferenceDatasetConfig(dataset_name=str(pairs), eval_fraction=0.2)
    if in_memory:
        data = [json.loads(line) for line in pairs.read_text().splitlines()]
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": 4, "max_steps": 2, "log_every": 1,
        "learning_rate": 1e-4, "tokens_per_micro_batch": 300, "save_every": 1, "eval_every": 1,
        "background_saving": True,
    }  # fmt: skip
    run_dpo(
        checkpoint,
        TrainingConfig(**(fields | changes)),
        DPOConfig(max_length=64, reference=reference),
        data,
        dry_run=dry_run,
    )


@contextmanager
def fails(where: str) -> Iterator[None]:
    """End a run by an error on all ranks: in a forward of the `training`, in the check of the
    `reference`, or in `scoring`."""
    owner, name = {
        "training": (FusedHead, "forward"), "reference": (ReferencePass, "check"),
        "scoring": (score, "score_everywhere"),
    }[where]  # fmt: skip
    real = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> Any:
        if where != "training" or torch.is_grad_enabled():
            raise ValueError("made to fail")
        return real(*arguments, **options)

    setattr(owner, name, failing)
    try:
        with pytest.raises(ValueError, match="made to fail"):
            yield
    finally:
        setattr(owner, name, real)


def own_temporary(folder: Path) -> None:
    """Keep other processes from making temporary files in this process's folder."""
    place = folder / f"temporary{os.environ['RANK']}"
    place.mkdir()
    tempfile.tempdir = str(place)


def many_runs(inputs: tuple[Path, Path], folder: Path, count: int, zero: int | None) -> list[Held]:
    """Measure one rank after each run but the first few. Every third run ends by an error, and
    every third has its pairs as objects in memory."""
    own_temporary(folder)
    use_deepspeed(None if zero is None else stage(zero), folder)
    held = []
    for number in range(count):
        if number % 3 == 1:
            with fails("training"):
                train(inputs, folder / str(number))
        elif number % 3 == 2:
            train(inputs, folder / str(number), in_memory=True)
        else:
            train(inputs, folder / str(number))
        if number >= WARM:
            held.append(Held.now())
    return held


def many_steps(inputs: tuple[Path, Path], folder: Path, count: int) -> list[Held]:
    """Measurements of a process after each tenth of a run's steps, from the second tenth on."""
    own_temporary(folder)
    held = []
    real = loop._optimizer_step

    def noted(*arguments: Any) -> Any:
        step = arguments[1]
        if step % (count // 10) == 0 and step > count // 10:
            held.append(Held.now())
        return real(*arguments)

    loop._optimizer_step = noted
    fields = {"save_every": count // 5, "eval_every": count // 5, "log_every": 5}
    train(inputs, folder / "run", max_steps=count, **fields)
    return held


def tries(inputs: tuple[Path, Path], folder: Path) -> None:
    with (trial := DryRun()).cleaned_up():
        train(inputs, folder, dry_run=trial)


def scores(inputs: tuple[Path, Path], folder: Path) -> None:
    checkpoint, pairs = inputs
    data = PreferenceDatasetConfig(dataset_name=str(pairs))
    folder.mkdir(exist_ok=True)
    # Two models, one after the other.
    options = {"reference": str(checkpoint), "max_length": 64}
    score.score_pairs(str(checkpoint), data, folder / "scores.jsonl", **options)


WAYS: dict[str, tuple[Callable[..., None], str]] = {
    "done": (train, ""), "live": (partial(train, reference="model"), ""),
    "failed in a forward": (train, "training"), "failed in the check": (train, "reference"),
    "tried": (tries, ""), "scored": (scores, ""), "failed in scoring": (scores, "scoring"),
}  # fmt: skip
"""Names of the function that a run calls, and of the place where it fails."""


def models_left(inputs: tuple[Path, Path], folder: Path) -> dict[str, list[str]]:
    """Return what is still in memory after runs that ended in several ways, by kind of end."""
    outcome.write_report = lambda run: None  # drawing takes longer than the run
    kinds = ("TokenScorer", "DeepSpeedEngine", "DistributedDataParallel")
    left = {}
    for zero in (None, 2, 3):
        use_deepspeed(None if zero is None else stage(zero), folder)
        for way, (call, trouble) in WAYS.items():
            # Each with its own store, so that the reference pass computes.
            os.environ["MODERN_LLM_CACHE"] = str(folder / f"store-{zero}-{way}")
            with fails(trouble) if trouble else nullcontext():
                call(inputs, folder / f"{zero}-{way}")
            gc.collect()
            found = [name for o in gc.get_objects() if (name := type(o).__name__) in kinds]
            left[f"{zero} {way}"] = found
    assert "deepspeed.runtime.zero.parameter_offload" in sys.modules
    return left


@pytest.mark.slow
def test_no_model_stays_however_a_run_ends(tmp_path, inputs):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    for left in run_ranks(models_left, 2, inputs, tmp_path, timeout=280):
        assert left == {f"{zero} {way}": [] for zero in (None, 2, 3) for way in WAYS}


@pytest.mark.slow
def test_runs_in_one_process_leave_nothing(tmp_path, inputs):
    (held,) = run_ranks(many_runs, 1, inputs, tmp_path, 7, None, timeout=300)
    check_flat(held, megabytes=4, objects=200)


@pytest.mark.slow
def test_steps_of_one_run_leave_nothing(tmp_path, inputs):
    (held,) = run_ranks(many_steps, 1, inputs, tmp_path, 200, timeout=300)
    # The first saves and evaluations allocate; after them memory stays constant.
    check_flat(held[1:], megabytes=4, objects=2000)


@pytest.mark.long
@pytest.mark.timeout(1900)
def test_thirty_runs_in_one_process_leave_nothing(tmp_path, inputs):
    (held,) = run_ranks(many_runs, 1, inputs, tmp_path, 30, None, timeout=1200)
    check_flat(held, megabytes=5, objects=500)


@pytest.mark.long
@pytest.mark.timeout(1900)
def test_three_thousand_steps_of_one_run_leave_nothing(tmp_path, inputs):
    (held,) = run_ranks(many_steps, 1, inputs, tmp_path, 3000, timeout=1800)
    check_flat(held[1:], megabytes=5, objects=2000)


@pytest.mark.long
@pytest.mark.timeout(1900)
@pytest.mark.parametrize("zero", [None, 2, 3])
def test_runs_in_two_processes_leave_nothing(tmp_path, inputs, zero):
    if zero is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    for held in run_ranks(many_runs, 2, inputs, tmp_path, 10, zero, timeout=1800):
        check_flat(held, megabytes=8, objects=2000)
