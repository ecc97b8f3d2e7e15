"""What the checks are written with: a trainer to call, and the outcome of a check.

A trainer is a process per call, in its own environment; see `serve.py`.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
HOLDS, FAILS, MEASURED = "holds", "fails", "measured"
NOT_APPLICABLE, NOT_HERE, NEEDS_GPU = "not applicable", "does not run here", "needs a GPU"
VERDICTS = (HOLDS, FAILS, MEASURED, NOT_APPLICABLE, NOT_HERE, NEEDS_GPU)


@dataclass(frozen=True)
class Outcome:
    """One cell: verdict, one sentence with the measured figure, and all figures."""

    verdict: str
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)


def judged(holds: bool, sentence: str, **figures: Any) -> Outcome:
    """Return a cell that holds or fails."""
    return Outcome(HOLDS if holds else FAILS, sentence, figures)


def within(bound: float, differences: dict[str, float], exact: str = "") -> Outcome:
    """Return a cell that holds if no difference is above the bound.

    Args:
        exact: the sentence where all of them are 0.
    """
    off = max(differences.values())
    parts = ", ".join(f"{name} {value:.0e}" for name, value in differences.items())
    text = exact if exact and off == 0 else f"largest differences: {parts}"
    return judged(off <= bound, text, bound=bound, **differences)


class Skipped(Exception):
    """A cell that was not run, with its verdict and the reason."""

    def __init__(self, verdict: str, reason: str):
        super().__init__(reason)
        self.verdict = verdict


class Failed(Exception):
    """An operation that a check needs ended with an error; the text is its end."""


@dataclass(frozen=True)
class Attempt:
    """An operation that was allowed to fail."""

    status: int
    answer: dict[str, Any]
    text: str
    """Both outputs of the process."""

    @property
    def done(self) -> bool:
        """Whether it ended well and answered."""
        return self.status == 0 and bool(self.answer)


class Trainer:
    """Calls the operations of one adapter.

    Args:
        python: interpreter of the trainer's environment.
        folder: for requests, logs, and whatever the trainer keeps outside its output folder.
        real_model: folder of a real model, for the check of speed.
    """

    def __init__(self, name: str, python: Path, folder: Path, real_model: Path | None = None):
        self.name, self.python, self.folder, self.real_model = name, python, folder, real_model
        self.threads, self.limit = 1, 600  # tiny models are fastest on one thread
        self._numbers = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)

    def call(self, operation: str, processes: int = 1, **request: Any) -> dict[str, Any]:
        """Run an operation and return its answer.

        Raises:
            Failed: it ended with an error.
            Skipped: the trainer does not offer it, or only on a GPU.
        """
        attempt = self.attempt(operation, processes, **request)
        if not attempt.done:
            lines = [line for line in attempt.text.splitlines() if line.strip()]
            raise Failed(" ".join(lines[-3:])[-500:] or f"status {attempt.status}")
        return attempt.answer

    def attempt(self, operation: str, processes: int = 1, **request: Any) -> Attempt:
        """Run an operation that may fail, or be killed."""
        number = next(self._numbers)
        asked = self.folder / f"{number}.request.json"
        answered = self.folder / f"{number}.answer.json"
        asked.write_text(json.dumps(request, default=str), "utf-8")
        words = [str(HERE / "serve.py"), self.name, operation, str(asked), str(answered)]
        if processes > 1:
            many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            words = [*many, *words]
        done = self._run([str(self.python), *words], self.threads)
        answer = json.loads(answered.read_text("utf-8")) if answered.exists() else {}
        (self.folder / f"{number}.log").write_text(done.stdout, "utf-8")
        if "not_offered" in answer:
            raise Skipped(NOT_APPLICABLE, answer["not_offered"])
        if "needs_gpu" in answer:
            raise Skipped(NEEDS_GPU, answer["needs_gpu"])
        return Attempt(done.returncode, answer, done.stdout)

    def _run(self, words: Sequence[str], threads: int) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.folder / "datasets"),
            "MODERN_LLM_CACHE": str(self.folder / "reference"),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONHASHSEED": "0",
        }
        try:
            return subprocess.run(
                words,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=self.limit,
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"no end within {self.limit} seconds") from error


def weights(path: str | Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file, in float64, without the wrappers' prefixes."""
    from safetensors.torch import load_file

    return {name: tensor.double() for name, tensor in load_file(path).items()}


def difference(one: str | Path, other: str | Path) -> float:
    """Return the largest difference between the weights of two models."""
    left, right = weights(one), weights(other)
    if left.keys() != right.keys():
        raise Failed(f"{one} and {other} do not hold the same tensors")
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def relative(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference of two lists of losses, relative above 1."""
    if len(one) != len(other):
        raise Failed(f"{len(one)} and {len(other)} losses of the same steps")
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(one, other, strict=True))


def named(options: Any, allowed: Sequence[str], what: str) -> list[str]:
    """Return the names that were chosen, all by default; an unknown one ends the program."""
    unknown = sorted(set(options or ()) - set(allowed))
    if unknown:
        print(
            f"audit: error: there is no {what} {unknown[0]}: use one of {', '.join(allowed)}",
            file=sys.stderr,
        )
        sys.exit(2)
    return list(options or allowed)
