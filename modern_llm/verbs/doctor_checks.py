"""What a machine has and what would stop a run on it: the checks behind `modern-llm doctor`.

Each check examines one thing, returns a `Check`, and leaves nothing changed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from modern_llm.config import ModernLLMConfig, TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.config.versions import installed
from modern_llm.distributed.build_locks import build_locks, lock_folders
from modern_llm.storage.fault_points import around

LOW_DISK_GB = 20.0
GROUP_SECONDS = 90


@dataclass(frozen=True)
class Check:
    """One finding: `state` is ok, note or problem; `cure` says what to do about a problem."""

    name: str
    state: str
    found: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as JSON can hold it."""
        return asdict(self)


def examine_machine(places: Sequence[Path], *, group: bool = True) -> list[Check]:
    """Return every check.

    Args:
        places: folders that a run writes into; they need not exist.
        group: whether to start two processes that talk to each other (takes some seconds).
    """
    checks = [versions(), *devices(), *compilers(), *locks(lock_folders())]
    for place in places:
        checks += [disk(place), writable(place)]
    checks.append(hub())
    if group:
        checks.append(process_group())
    return checks


def versions() -> Check:
    """Python and every package that matters, as installed."""
    found = ", ".join(f"{name} {version}" for name, version in installed().items())
    return Check("versions", "ok", found)


def devices() -> list[Check]:
    """Processors, memory and accelerators."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB memory"
    machine = f"{platform.system()} {platform.machine()}, {cores} cores{memory}"
    checks = [Check("machine", "ok", machine)]
    if torch.cuda.is_available():
        for at in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(at)
            text = (
                f"{torch.cuda.get_device_name(at)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            )
            busy = free < 0.9 * total
            cure = "another process holds memory on it; look at nvidia-smi" if busy else ""
            checks.append(Check(f"cuda:{at}", "note" if busy else "ok", text, cure))
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16: use fp16"
        checks.append(Check("cuda", "ok", f"CUDA {torch.version.cuda}, {bf16}"))
    elif shutil.which("nvidia-smi"):
        text = f"nvidia-smi is there, but torch {torch.__version__} sees no GPU"
        cure = "install a torch build that fits the driver; see CUDA_VISIBLE_DEVICES"
        checks.append(Check("cuda", "problem", text, cure))
    else:
        checks.append(Check("cuda", "note", "no GPU: runs use the CPU"))
    return checks


def compilers() -> list[Check]:
    """What DeepSpeed's own optimizer kernels and torch.compile are built with."""
    found = {name: _version(name) for name in ("g++", "ninja", "nvcc")}
    have = ", ".join(f"{name} {text}" for name, text in found.items() if text) or "none"
    missing = [name for name in ("g++", "ninja") if not found[name]]
    if not missing:
        return [Check("compilers", "ok", have)]
    cure = f"install {' and '.join(missing)} for offloaded optimizers and train.compile"
    return [Check("compilers", "note", have, cure)]


def _version(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    numbers = re.findall(r"\d+\.\d+(?:\.\d+)?", done.stdout)
    return numbers[0] if numbers else "?"


def locks(folders: Iterable[Path]) -> list[Check]:
    """Lock files of extension builds: one that a killed build left makes every later one wait."""
    found, stale = build_locks(folders)
    if not stale:
        held = f"{len(found)} held by a build that runs" if found else "none"
        return [Check("build locks", "ok", held)]
    return [Check("build locks", "problem", str(lock), lock.fix) for lock in stale]


def _existing(place: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = place.expanduser().absolute()
    return next(p for p in (place, *place.parents) if p.exists())


def disk(place: Path) -> Check:
    """Free room where a run would write."""
    free = shutil.disk_usage(_existing(place)).free / 1e9
    state = "ok" if free >= LOW_DISK_GB else "note"
    cure = "a checkpoint of a 1B model takes 12 GB; name a larger place" if state == "note" else ""
    return Check(f"disk {place}", state, f"{free:.1f} GB free", cure)


def writable(place: Path) -> Check:
    """Whether a file can be made, flushed and removed there."""
    there = _existing(place)
    try:
        if not there.is_dir():
            raise NotADirectoryError(20, "Not a directory")
        with tempfile.NamedTemporaryFile(dir=there, prefix=".tmp-doctor-") as file:
            with around("doctor.write"):
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        cure = "name another folder, or make this one writable"
        return Check(f"write {place}", "problem", f"{there}: {error.strerror or error}", cure)
    return Check(f"write {place}", "ok", "can be written")


def hub() -> Check:
    """Whether the Hub answers, and with whose token."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return Check("hub", "note", "HF_HUB_OFFLINE is set: only local folders and the cache")
    token = "with a token" if get_token() else "without a token"
    try:
        answer = get_session().get(f"{constants.ENDPOINT}/api/models?limit=1", timeout=5)
        answer.raise_for_status()
    except Exception as error:  # the client's own errors differ between its versions
        text = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        return Check("hub", "note", text, "use local folders, or set HF_ENDPOINT or the proxy")
    return Check("hub", "ok", f"{constants.ENDPOINT} answers, {token}")


def sharing_rows(config: TrainingConfig, model: str | ModernLLMConfig) -> Check:
    """Whether processes can share the rows of this run (`train.sequence_parallel`).

    Args:
        model: its checkpoint, or the shape of a new one.
    """
    import torch

    from modern_llm.models.build import to_transformers_config
    from modern_llm.models.load import inspect_checkpoint
    from modern_llm.setup.scorers import check_split

    name, parts, gpus = "sequence_parallel", config.sequence_parallel, torch.cuda.device_count()
    try:
        if isinstance(model, ModernLLMConfig):
            check_split(config, to_transformers_config(model))
        else:
            check_split(config, inspect_checkpoint(model).config)
    except UserError as error:
        return Check(name, "problem", str(error), "see train.sequence_parallel")
    if gpus % parts:
        found = f"groups of {parts} processes do not fit the {gpus} GPUs of this machine evenly"
        return Check(
            name, "note", found, "groups over machines wait for the network in every layer"
        )
    return Check(name, "ok", f"{parts} processes can share the rows of this model")


GROUP = """
import datetime, os, torch, torch.distributed as dist
nccl = torch.cuda.is_available() and torch.cuda.device_count() > 1
if nccl:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl" if nccl else "gloo", timeout=datetime.timedelta(seconds=60))
value = torch.ones(1, device="cuda" if nccl else "cpu") * (dist.get_rank() + 1)
dist.all_reduce(value)
assert value.item() == 3, value
print(dist.get_backend(), flush=True)
dist.destroy_process_group()
"""


def process_group() -> Check:
    """Whether two processes of this machine find each other and add two numbers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", GROUP],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=GROUP_SECONDS) for process in running]
    except subprocess.TimeoutExpired:
        text = f"two processes did not find each other in {GROUP_SECONDS} s"
        return Check("process group", "problem", text, "look at the firewall and the host name")
    finally:
        for process in running:
            process.kill()
            process.communicate()
    failed = [err for (_, err), p in zip(answers, running, strict=True) if p.returncode]
    if failed:
        last = (failed[0].strip().splitlines() or ["no message"])[-1]
        return Check(
            "process group", "problem", last[:300], "see torch's distributed troubleshooting"
        )
    return Check("process group", "ok", f"two processes over {answers[0][0].strip()}")


def problems_of(checks: Sequence[Check]) -> list[Check]:
    """Return the checks that would stop a run."""
    return [check for check in checks if check.state == "problem"]


def as_result(checks: Sequence[Check]) -> dict[str, Any]:
    """Return all checks as JSON can hold them."""
    return {"problems": len(problems_of(checks)), "checks": [check.as_dict() for check in checks]}
