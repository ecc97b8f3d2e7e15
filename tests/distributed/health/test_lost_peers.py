"""After a process ends while others wait for it, all end soon, and its own line comes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from modern_llm.config.errors import PeerError
from modern_llm.distributed.health.peer_failure import as_peer_error
from tests.distributed.test_launchers import free_port
from tests.helpers.text import transcripts, write_jsonl

ROOT = Path(__file__).resolve().parents[3]
# The command line as torchrun starts it, with one rank that ends in step 3 in a given way.
FAULTY = """
import os, signal, sys
from modern_llm import cli
from modern_llm.config.errors import DataError
from modern_llm.training import loop

real = loop._optimizer_step

def faulty(context, step):
    if step == 2 and context.runtime.rank == {rank}:
        if {how!r} == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise DataError("pairs.jsonl:17: this row alone is broken")
    return real(context, step)

loop._optimizer_step = faulty
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def run(tmp_path, tiny_checkpoint):
    settings = {
        "sft_checkpoint": str(tiny_checkpoint),
        "train": {
            "run_name": "x", "output_dir": str(tmp_path / "run"), "batch_size": 8,
            "max_steps": 6, "log_every": 1, "tokens_per_micro_batch": 300,
        },
        "dpo": {"max_length": 64},
        "data": {"dataset_name": str(write_jsonl(tmp_path / "p.jsonl", transcripts(45)))},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def start(folder: Path, run: Path, how: str, rank: int, **environment: str):
    script = folder / "faulty.py"
    script.write_text(FAULTY.format(how=how, rank=rank))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
        str(script), "dpo", "--config", str(run),
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("how", "rank", "deepspeed"),
    [
        pytest.param("kill", 0, False, marks=pytest.mark.slow),
        pytest.param("kill", 1, False, marks=pytest.mark.slow),
        pytest.param("raise", 1, False, marks=pytest.mark.slow),
        pytest.param("raise", 1, True, marks=pytest.mark.slow),
    ],
)
def test_all_end_within_30_s_and_the_line_of_the_cause_is_first(
    how, rank, deepspeed, run, tmp_path
):
    environment = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    if deepspeed:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs" / "zero2.json"),
        }
    process = start(tmp_path, run, how, rank, **environment)
    try:
        for line in process.stdout:
            if line.startswith("step=2 "):
                break
        last_step = time.monotonic()
        workers = psutil.Process(process.pid).children(recursive=True)
        _, errors = process.communicate(timeout=60)
        gone = time.monotonic() - last_step
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode != 0 and gone < 30, errors[-2000:]
    assert not any(worker.is_running() for worker in workers)
    lines = [line for line in errors.splitlines() if "modern-llm: error:" in line]
    if how == "raise":
        assert "pairs.jsonl:17: this row alone is broken" in lines[0], errors[-2000:]
        assert len(lines) <= 2
    else:
        assert len(lines) <= 1 and all("lost another process" in line for line in lines)
    outcome = tmp_path / "run" / "outcome.json"
    if rank == 1 and outcome.exists():  # torchrun may have ended rank 0 before it could write
        assert json.loads(outcome.read_text())["status"] == 5


def test_only_errors_of_a_lost_peer_become_a_peer_error(monkeypatch):
    import torch.distributed as dist

    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    assert as_peer_error(gloo) is gloo, "without a process group there is no peer"
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    found = as_peer_error(gloo)
    assert isinstance(found, PeerError) and found.__cause__ is gloo
    assert "run the same command again" in str(found)
    resumes = as_peer_error(gloo, lambda: "the same command resumes from step-00000004")
    assert "the same command resumes from step-00000004" in str(resumes)
    for other in (RuntimeError("shapes differ"), ValueError("Connection closed by peer")):
        assert as_peer_error(other) is other
