"""The shipped launcher files, used as in the documentation: `accelerate launch --config_file F`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.text import transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, numbers

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_environment() -> dict[str, str]:
    """Variables of a launcher on a CPU, with this package and without those of other launchers."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith("ACCELERATE_")}
    return kept | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }  # fmt: skip


def launch(name: str, run: Path, *options: str, processes: int = 2, verb: str = "dpo", **settings):
    """Run a verb under a launcher file; return the completed process."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"accelerate_configs/{name}.yaml",
        "--num_processes", str(processes), "--main_process_port", str(free_port()),
        "-m", "modern_llm", verb, "--config", str(run), *options,
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=launch_environment() | settings, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, tiny_checkpoint):
    """Write run.yaml for its own folder; the rest is the same for all."""
    data = write_jsonl(tmp_path_factory.mktemp("pairs") / "p.jsonl", transcripts(45))

    def write(folder: Path, **train) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "sft_checkpoint": str(tiny_checkpoint),
            "train": {
                "run_name": "x", "output_dir": str(folder / "run"), "batch_size": 8,
                "max_steps": 6, "learning_rate": 1e-3, "warmup_steps": 3, "log_every": 1,
                "tokens_per_micro_batch": 300, **train,
            },
            "dpo": {"max_length": 64},
            "data": {"dataset_name": str(data)},
        }  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return folder / "run.yaml"

    write.data = data
    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_checkpoint, run_file):
    folder = tmp_path_factory.mktemp("alone") / "run"
    return dpo(tiny_checkpoint, run_file.data, Case(folder, train={"max_steps": 6}))


@pytest.mark.parametrize(
    "name",
    [
        "zero2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero3_offload")),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("cpu", "zero1", "zero3")),
    ],
)
def test_one_command_under_every_file(name, tmp_path, run_file, alone):
    processes = 1 if name == "cpu" else 2
    options = ["--json", "--expect-world", str(processes)]
    done = launch(name, run_file(tmp_path), *options, processes=processes)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["final"].endswith("x_final")
    for found, expected in zip(numbers(tmp_path / "run"), alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_impossible_settings_are_one_error_line(tmp_path, run_file):
    done = launch("fsdp2", run_file(tmp_path))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "modern-llm: error:" in line]
    assert len(lines) == 1 and "FSDP needs a GPU" in lines[0], done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_every_file_names_an_existing_deepspeed_file():
    names = {file.stem for file in FILES}
    assert names == {
        "cpu", "single_gpu", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2",
        "multi_node_zero2", "multi_node_zero3",
    }  # fmt: skip
    said = set()
    for file in FILES:
        content = yaml.safe_load(file.read_text())
        # These are set only by the run's configuration.
        assert "mixed_precision" not in content and "gradient_accumulation_steps" not in content
        section = content.get("deepspeed_config", {})
        assert (content["distributed_type"] == "DEEPSPEED") == bool(section)
        if section:
            said.add(section["deepspeed_config_file"])
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "ds_configs").glob("*.json")}
    assert there - said == {"ds_configs/reference_zero3.json"} and said < there
