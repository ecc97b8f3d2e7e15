"""Two "nodes" in network namespaces: one run on both, and the errors if they differ."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from modern_llm.distributed.rendezvous.preflight import main
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, numbers

ROOT = Path(__file__).resolve().parents[3]


def namespaces() -> str | None:
    """Return why network namespaces are not available, None if they are."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "ip (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"mltest{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if made.returncode == 0 else f"no network namespaces: {made.stderr.strip()}"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """Start launch/two_nodes_local.sh on a run; return (status, stderr, seconds)."""
    if reason := namespaces():
        pytest.skip(reason)

    def start(run: Path, **environment: str) -> tuple[int, str, float]:
        began = time.monotonic()
        process = subprocess.Popen(
            ["bash", "launch/two_nodes_local.sh", "dpo", "--config", str(run)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHON": sys.executable, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            out, errors = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            out, errors = process.communicate(timeout=30)
            raise AssertionError(f"it hung: {errors[-3000:]}") from None
        return process.returncode, errors + out, time.monotonic() - began

    return start


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    data = write_jsonl(folder / "p.jsonl", transcripts(45))
    settings = {
        "sft_checkpoint": str(checkpoint),
        "train": {
            "run_name": "x", "output_dir": str(folder / "run"), "batch_size": 8, "max_steps": 6,
            "learning_rate": 1e-3, "warmup_steps": 3, "log_every": 1,
            "tokens_per_micro_batch": 300, "save_every": 1000,
        },
        "dpo": {"max_length": 64},
        "data": {"dataset_name": str(data)},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml", checkpoint, data


@pytest.mark.slow
def test_zero_2_over_two_nodes_equals_one_process(two_nodes, run_file, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    run, checkpoint, data = run_file
    status, errors, _ = two_nodes(run, ACCELERATE_CONFIG="accelerate_configs/multi_node_zero2.yaml")
    assert status == 0, errors[-3000:]
    assert "2 nodes met" in errors
    alone = dpo(checkpoint, data, Case(tmp_path / "alone", train={"max_steps": 6}))
    found = numbers(run.parent / "run")
    assert len(found) == 6
    for one, other in zip(found, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "mllm" not in left


def test_a_wrong_machine_rank_is_one_line_at_once(two_nodes, run_file):
    status, errors, seconds = two_nodes(run_file[0], NODE_RANKS="0 0")
    lines = [line for line in errors.splitlines() if "modern-llm: error:" in line]
    assert status == 5 and seconds < 90
    assert lines and all("node" in line and "machine_rank" in line for line in lines), errors


@pytest.mark.slow
def test_a_missing_node_is_one_line_within_a_minute(two_nodes, run_file):
    status, errors, seconds = two_nodes(run_file[0], NODE_RANKS="0")
    lines = [line for line in errors.splitlines() if "modern-llm: error:" in line]
    assert status == 5 and len(lines) == 1 and 55 < seconds < 90
    assert "node 1 of 2 (node 1) did not come within 60 s" in lines[0]


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meeting(
    *configs: Path, ranks: tuple[int, ...] = (0, 1), seconds: float = 30, folders: Sequence = ()
) -> list:
    """Run the check on two nodes as processes; return (status, stderr) of each."""
    at = str(port())
    processes = [
        subprocess.Popen(
            [
                sys.executable, "-m", "modern_llm.distributed.rendezvous.preflight", "--nodes", "2",
                "--node_rank", str(rank), "--main_address", "127.0.0.1", "--main_port", at,
                "--seconds", str(seconds), "--config", str(config),
            ],
            cwd=folder, text=True, stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT), "MODERN_LLM_CACHE": str(config.parent)},
        )
        for rank, config, folder in zip(ranks, configs, folders or (ROOT, ROOT), strict=True)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.mark.slow
def test_a_file_that_differs_is_named_on_every_node(tmp_path):
    configs = []
    for node in ("a", "b"):
        folder = tmp_path / node
        folder.mkdir()
        (folder / "run.yaml").write_text("train: {batch_size: 8}\n")
        configs.append(folder / "run.yaml")
    for status, errors in meeting(*configs):
        assert status == 0 and "2 nodes met" in errors
    configs[1].write_text("train: {batch_size: 9}\n")
    for status, errors in meeting(*configs):
        (line,) = [text for text in errors.splitlines() if "modern-llm: error:" in text]
        assert status == 5
        assert "node 1 (node 1, " in line and "differs from node 0 in its files: run.yaml" in line


def test_a_port_in_use_is_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        at = str(taken.getsockname()[1])
        words = ["--nodes", "1", "--node_rank", "0", "--main_address", "127.0.0.1"]
        assert main([*words, "--main_port", at, "--seconds", "2"]) == 2
    assert f"port {at} is in use on this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_local_inputs_that_differ_are_named_on_every_node(tmp_path):
    configs = []
    for node in ("a", "b"):
        folder = tmp_path / node
        folder.mkdir()
        (folder / "run.yaml").write_text("data: {dataset_name: p.jsonl}\n")
        (folder / "p.jsonl").write_text("1\n")
        configs.append(folder / "run.yaml")
    folders = [config.parent for config in configs]
    for status, errors in meeting(*configs, folders=folders):
        assert status == 0 and "2 nodes met" in errors
    (folders[1] / "p.jsonl").write_text("2\n")
    for status, errors in meeting(*configs, folders=folders):
        (line,) = [text for text in errors.splitlines() if "modern-llm: error:" in text]
        assert status == 5 and "differs from node 0 in its files: p.jsonl" in line


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh", "two_nodes_local.sh"])
def test_scripts_are_short_and_parse(name):
    path = ROOT / "launch" / name
    assert len(path.read_text().splitlines()) < 60
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_the_kubernetes_job_starts_the_same_script():
    text = (ROOT / "launch" / "kubernetes.yaml").read_text()
    assert len(text.splitlines()) < 60
    job = yaml.safe_load(text)
    replicas = job["spec"]["pytorchReplicaSpecs"]
    for kind in ("Master", "Worker"):
        (container,) = replicas[kind]["template"]["spec"]["containers"]
        assert container["command"][:3] == ["bash", "launch/torchrun.sh", "dpo"]
        named = {entry["name"]: entry["value"] for entry in container["env"]}
        assert (ROOT / named["ACCELERATE_CONFIG"]).is_file()
