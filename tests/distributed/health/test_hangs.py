"""A process that hangs while others wait for it is named with its phase, and all end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.forks import fork_server
from tests.helpers.runs import command, write_run
from tests.helpers.text import transcripts, write_jsonl

LEAST_S = 6
"""Seconds of a hang; a step of these runs takes some hundredths."""


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("forks"), "tests.helpers.runs") as server:
        yield server


class Run:
    """One DPO run on two forked processes."""

    def __init__(self, forks, folder: Path, model: Path, fault: str = "", trick: str = ""):
        self.folder = folder / "run"
        settings = {
            "sft_checkpoint": str(model),
            "train": {
                "run_name": "x", "output_dir": str(self.folder), "batch_size": 4, "log_every": 1,
                "max_steps": 5000, "save_every": 4, "keep_checkpoints": 1, "eval_every": 5000,
                "hang_timeout": LEAST_S, "warmup_steps": 0,
            },
            "dpo": {"max_length": 64},
            "data": {"dataset_name": str(write_jsonl(folder / "p.jsonl", transcripts(45)))},
        }  # fmt: skip
        arguments = ["dpo", *write_run(folder / "run.yaml", settings)]
        environment = {"MODERN_LLM_CACHE": str(folder / "cache")}
        if fault:
            environment["MODERN_LLM_FAULT"] = fault
        self.jobs = forks.start_ranks(command, 2, arguments, environment, trick)
        self._begun = time.monotonic()

    def reaches(self, step: int) -> None:
        while f"step={step} " not in self.jobs[0].text:
            assert time.monotonic() < self._begun + 120, self.jobs[0].text + self.jobs[1].text
            assert all(job.status is None for job in self.jobs), self.jobs[0].text
            time.sleep(0.02)

    def end(self, rank: int, phase: str, *, killed: bool) -> float:
        """Wait for both ranks; check which one is named, and its phase. Return the seconds."""
        began = time.monotonic()
        for job in self.jobs:
            assert job.wait(90), [job.text[-2000:] for job in self.jobs]
        statuses = [job.status for job in self.jobs]
        texts = self.jobs[0].text + self.jobs[1].text
        assert statuses[1 - rank] == 5, texts
        # The signal for its stacks may wake it up, so that it ends by itself.
        assert statuses[rank] == 5 or (killed and statuses[rank] == -signal.SIGKILL), texts
        lines = [line for line in texts.splitlines() if line.startswith("modern-llm: error:")]
        assert len(lines) == 1 and re.search(rf"error: rank {rank} \(", lines[0]), lines
        assert f"in the phase {phase}" in lines[0], lines
        outcome = json.loads((self.folder / "outcome.json").read_text())
        assert outcome["status"] == 5 and f"in the phase {phase}" in outcome["reason"]
        if " of step " in phase:
            step = int(phase.rpartition(" ")[2])
            assert outcome["last_step"] == (
                step if phase.startswith(("saving", "averaging")) else step - 1
            )
        for other in (0, 1):
            if killed and other == rank:  # C code writes its stacks to stderr
                assert "most recent call first" in self.jobs[other].text
            else:
                stack = (self.folder / "stacks" / f"rank-{other:05d}.txt").read_text()
                assert stack.count("most recent call first") >= 3, stack
        return time.monotonic() - began


# What hangs, how, and the reported rank and phase.
CASES = {
    "a sleep in the loader": ("loader.before:1:3:sleep", "", 1, "loading the batch of step 3"),
    "a sleep in a save": ("tensors.write.before:0:1:sleep", "", 0, "saving of step 4"),
    "an interpreter that is never released": ("", "gil:3", 1, "forward and backward of step 3"),
    "metrics that are never averaged": ("", "metrics:3", 1, "averaging the metrics of step 3"),
}


@pytest.mark.slow
def test_hangs_in_loader_save_metrics_and_a_blocked_interpreter(forks, tmp_path, tiny_checkpoint):
    runs = {}
    for number, (name, (fault, trick, _, _)) in enumerate(CASES.items()):
        (tmp_path / str(number)).mkdir()
        runs[name] = Run(forks, tmp_path / str(number), tiny_checkpoint, fault, trick)
    for name, (_, trick, rank, phase) in CASES.items():
        runs[name].end(rank, phase, killed=trick.startswith("gil"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_process_is_named_and_ended_and_the_same_command_resumes(
    rank, forks, tmp_path, tiny_checkpoint
):
    run = Run(forks, tmp_path, tiny_checkpoint)
    run.reaches(9)
    os.kill(run.jobs[rank].pid, signal.SIGSTOP)
    phase = (
        r"(loading the batch|forward and backward|optimizer|waiting for the result|"
        r"averaging the metrics|saving) of step \d+"
    )
    texts = ""
    for job in run.jobs:
        assert job.wait(90), [job.text[-2000:] for job in run.jobs]
        texts += job.text
    assert re.search(rf"error: rank {rank} \(.*wait in the phase {phase};", texts), texts
    # Continued to write its stacks, it learns of the end, or is killed, or writing them crashes:
    # the C code reads the frames of threads that run again.
    ends = {5, -signal.SIGKILL, -signal.SIGSEGV}
    assert run.jobs[1 - rank].status == 5 and run.jobs[rank].status in ends
    assert run.jobs[rank].text.count("most recent call first") >= 3
    assert json.loads((run.folder / "outcome.json").read_text())["status"] == 5
    if rank == 1:  # and one that sleeps while it loads the checkpoint
        (tmp_path / "again").mkdir()
        again = Run(forks, tmp_path, tiny_checkpoint, "checkpoint.load.before:1:1:sleep")
        again.end(1, "loading the checkpoint", killed=False)


def verb(arguments: list[str], environment: dict[str, str]) -> None:
    """Run a verb in a forked process; an answer waits 10 s after its second token."""
    from modern_llm.inference import generate

    made = [0]

    def slow(self, ids, scores, **_):
        made[0] += 1
        if made[0] == 3:
            time.sleep(10)
        self._check()
        return torch.zeros(len(ids), dtype=torch.bool)

    generate._CheckEachToken.__call__ = slow
    command(arguments, environment)


@pytest.mark.slow
def test_long_verbs_are_watched_too(forks, tmp_path, tiny_checkpoint):
    data = str(write_jsonl(tmp_path / "p.jsonl", transcripts(45)))
    pairs = ["--data", data, "--model", str(tiny_checkpoint), "--max_length", "64"]
    watched = ["--hang_timeout", "4"]
    fill = ["--sft_checkpoint", str(tiny_checkpoint), "--dpo.max_length", "64"]
    fill += ["--train.run_name", "x", "--train.output_dir", str(tmp_path / "run")]
    fill += ["--data.dataset_name", data, "--train.hang_timeout", "4"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    sleeping = {"MODERN_LLM_CACHE": str(tmp_path / "cache"), "TMPDIR": str(temporary)}
    sleeping["MODERN_LLM_FAULT"] = "collective.begin.before:1:3:sleep"
    jobs = {}
    for name, arguments in {
        "scoring": ["score", *pairs, "--output", str(tmp_path / "o.jsonl"), *watched],
        "reference pass": ["reference", "fill", *fill],
    }.items():
        jobs[name] = forks.start_ranks(verb, 2, arguments, sleeping)
    for phase, of_verb in jobs.items():
        for job in of_verb:
            assert job.wait(90), [job.text[-2000:] for job in of_verb]
        texts = "".join(job.text for job in of_verb)
        assert [job.status for job in of_verb] == [5] * len(of_verb), texts
        (line,) = [line for line in texts.splitlines() if line.startswith("modern-llm: error:")]
        rank = len(of_verb) - 1
        assert f"error: rank {rank} (" in line and f"in the phase {phase};" in line, line
        assert texts.count("most recent call first") >= 3, texts
    assert not (tmp_path / "o.jsonl").exists()
    left = [path.name for path in temporary.iterdir()]
    assert not [name for name in left if name.startswith("modern-llm-")], left
    said = "".join(job.text for job in jobs["scoring"])
    assert "nothing was written: run the same command again" in said
    said = "".join(job.text for job in jobs["reference pass"])
    assert "the same command scores only what is missing" in said


@pytest.mark.slow
def test_a_single_process_gets_a_warning_with_stacks_and_is_never_ended(
    forks, tmp_path, tiny_checkpoint
):
    prompt = ["--prompt", "the", "--max_new_tokens", "8", "--hang_timeout", "2"]
    job = forks.start(verb, ["generate", "--model", str(tiny_checkpoint), *prompt], {})
    assert job.wait(90), job.text
    assert job.status == 0, job.text
    lines = [line for line in job.text.splitlines() if line.startswith("warning: no progress")]
    assert lines and "in the phase answering" in lines[-1] and "never ended" in lines[-1], job.text
    assert "most recent call first" in job.text
    # Repeated only when the time has doubled.
    assert 1 <= len(lines) <= 4, lines


@pytest.mark.slow
def test_a_slow_process_is_named(forks, tmp_path, tiny_checkpoint):
    run = Run(forks, tmp_path, tiny_checkpoint, trick="slow:0.3")
    deadline = time.monotonic() + 90
    while "all wait for it" not in run.jobs[0].text and time.monotonic() < deadline:
        time.sleep(0.2)
    (line,) = [line for line in run.jobs[0].text.splitlines() if "all wait for it" in line]
    assert line.startswith("warning: rank 1 (") and "in each of its last 20 steps" in line
    assert all(job.status is None for job in run.jobs)
