"""After a launcher is asked to end, or killed, its processes save and stop, and none is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.distributed.test_launchers import free_port, launch_environment

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1",
                 "--master_port"],
    "accelerate": ["accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml",
                   "--num_processes", "2", "--main_process_port"],
    "accelerate alone": ["accelerate.commands.launch", "--config_file",
                         "accelerate_configs/cpu.yaml", "--main_process_port"],
}  # fmt: skip


def start(launcher: str, folder: Path, model: Path, pairs: Path) -> subprocess.Popen:
    settings = {
        "sft_checkpoint": str(model),
        "train": {
            "run_name": "x", "output_dir": str(folder / "run"), "batch_size": 4,
            "max_steps": 100_000, "log_every": 1, "save_every": 100_000,
        },
        "dpo": {"max_length": 64},
        "data": {"dataset_name": str(pairs)},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(free_port()), "-m", "modern_llm"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [*command, "dpo", "--config", str(folder / "run.yaml")], cwd=ROOT,
            env=launch_environment(),
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("torchrun", signal.SIGTERM),
        ("accelerate", signal.SIGKILL),
        ("accelerate alone", signal.SIGTERM),  # it ends without a signal to its processes
    ],
)
def test_all_save_and_stop_with_their_launcher(
    launcher, number, tmp_path, tiny_checkpoint, tiny_pairs
):
    process = start(launcher, tmp_path, tiny_checkpoint, tiny_pairs)
    workers: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while "step=5 " not in (tmp_path / "log").read_text():
            text = (tmp_path / "log").read_text()
            assert time.monotonic() < deadline and process.poll() is None, text
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == (1 if launcher == "accelerate alone" else 2)
        process.send_signal(number)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive, (tmp_path / "log").read_text()[-3000:]
        process.wait(30)
    finally:
        for worker in workers:
            if worker.is_running():
                worker.kill()
        process.kill()
        process.wait()
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert outcome["status"] == 75, (outcome, (tmp_path / "log").read_text()[-3000:])
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{outcome['last_step']:08d}" and outcome["last_step"] >= 5
    cause = "SIGTERM" if launcher == "torchrun" else "the end of its launcher"
    assert f"stopped by {cause} after step {outcome['last_step']}, saved" in outcome["reason"]
