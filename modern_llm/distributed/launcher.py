"""Check of the launcher's environment variables against the run's configuration.

Accelerate reads a variable for every argument that it is not given. Variables that would change
what is computed are compared with the run's configuration, and refused if they differ. While
Accelerate starts and prepares a model it sees only those in `KEPT`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed.deepspeed_config import value_at
from modern_llm.storage.regular_files import read_bytes

log = logging.getLogger(__name__)

PREFIXES = ("ACCELERATE_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
# Device, sharding backend, and the modules that ZeRO-3 gathers whole (MOE_LAYER_CLS_NAMES). The
# variables FSDP_*, which set how FSDP shards, are not affected.
KEPT = frozenset(
    "ACCELERATE_USE_CPU ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_FSDP ACCELERATE_TORCH_DEVICE "
    "ACCELERATE_DEBUG_MODE ACCELERATE_CPU_AFFINITY ACCELERATE_LOG_LEVEL "
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES "
    "ACCELERATE_USE_SAGEMAKER ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE".split()
)
# Fields of deepspeed_config in Accelerate's YAML -> the same setting in a DeepSpeed JSON.
ZERO = "ACCELERATE_DEEPSPEED_"
FIELDS = {
    f"{ZERO}ZERO_STAGE": "zero_optimization.stage",
    f"{ZERO}OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    f"{ZERO}OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
}
NOTHING = ("", "no", "none", "auto", "false")


# Variables with the number of processes that a launcher started.
STARTED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def grow_segments() -> None:
    """Let PyTorch's allocator on CUDA grow its segments, unless the user has set it up.

    Rows of many lengths otherwise leave free memory in pieces that fit no tensor. It is read when
    the device is first used.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def missing_processes(world: int) -> str:
    """Return a warning if the launcher was told to start more processes than arrived, or nothing.

    `accelerate launch --cpu --num_processes 2` starts one, and `srun` without torchrun starts
    processes that do not know of each other.
    """
    counts = {name: os.environ.get(name, "") for name in STARTED}
    counts["--num_processes of accelerate launch"] = _told_to_accelerate()
    for name, text in counts.items():
        if text.isdigit() and int(text) > world:
            return (
                f"{name} is {text}, and {world} process{'es' * (world > 1)} arrived: the others "
                f"take no part; start with torchrun --nproc_per_node {text}, or accelerate launch "
                "--config_file accelerate_configs/ddp.yaml"
            )
    return ""


def _told_to_accelerate() -> str:
    """Return the number after `--num_processes` on the command line of the parent process."""
    try:
        line = read_bytes(f"/proc/{os.getppid()}/cmdline").decode(errors="replace")
    except OSError:  # not Linux, or the parent has ended
        return ""
    words = line.replace("=", "\0").split("\0")
    launches = "launch" in words or any("accelerate" in word for word in words)
    names = {"--num_processes", "--num-processes", "-n"}
    found = [after for word, after in pairwise(words) if word in names]
    return found[0] if launches and found else ""


def asked(name: str) -> bool:
    """Whether a variable is set to yes."""
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def value_of(name: str) -> str | None:
    """Return the value of a variable, None if it is unset, empty or a word for "nothing"."""
    value = os.environ.get(name, "").strip()
    return None if value.lower() in NOTHING else value


@contextmanager
def hidden() -> Iterator[None]:
    """Hide all variables that Accelerate reads, except `KEPT`, inside the `with` block."""
    names = [n for n in os.environ if n.startswith(PREFIXES) and n not in KEPT]
    before = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(before)


def refuse_contradictions(config: TrainingConfig, *, on_cpu: bool, world: int) -> None:
    """Raise `ConfigError` for settings that launcher or machine would silently override."""
    problems = [
        *_machine(config, on_cpu=on_cpu),
        *_computation(config),
        *_sequence(config, world),
        *(_fsdp(world) if asked("ACCELERATE_USE_FSDP") else ()),
    ]
    if problems:
        raise ConfigError(problems)
    steps = value_of("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    if steps not in (None, "1", str(config.gradient_accumulation_steps)):
        log.warning(
            "warning: gradient_accumulation_steps %s of accelerate has no effect: "
            "train.batch_size %d counts the examples of one optimizer step; set "
            "train.gradient_accumulation_steps to choose the size of a forward",
            steps,
            config.batch_size,
        )


def _machine(config: TrainingConfig, *, on_cpu: bool) -> Iterator[str]:
    if config.precision == "fp16" and on_cpu:
        yield "train.mixed_precision fp16 needs a GPU: use bf16 or no on this machine"
    if on_cpu and asked("ACCELERATE_USE_FSDP"):
        yield (
            "FSDP needs a GPU: without one Accelerate silently leaves gradients unsynchronised; "
            "use accelerate_configs/ddp.yaml or a ZeRO stage on a CPU"
        )
    if asked("ACCELERATE_USE_DEEPSPEED") and asked("ACCELERATE_USE_CPU"):
        yield (
            "use_cpu silently switches DeepSpeed off: set use_cpu: false; on a machine without a "
            "GPU DeepSpeed then runs on the CPU"
        )


def _computation(config: TrainingConfig) -> Iterator[str]:
    """Yield a message for each launcher setting that contradicts the run."""
    # "no" is the launcher's default, not a setting of the user.
    precision = value_of("ACCELERATE_MIXED_PRECISION")
    if precision not in (None, config.precision, config.mixed_precision):
        yield (
            f"accelerate launch sets mixed precision {precision}, and train.mixed_precision is "
            f"{config.mixed_precision}: set both to the same value"
        )
    compiler = value_of("ACCELERATE_DYNAMO_BACKEND")
    if compiler is not None and not config.compile:
        yield (
            f"dynamo_backend {compiler} of accelerate has no effect: set train.compile true, or "
            "remove it"
        )
    if asked("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM is not supported: use a ZeRO stage (accelerate_configs/zero3.yaml)"
    sizes = [f"PARALLELISM_CONFIG_{kind}_SIZE" for kind in ("TP", "CP", "SP")]
    sizes += ["PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "PARALLELISM_CONFIG_DP_SHARD_SIZE"]
    split = [name for name in sizes if os.environ.get(name, "1") != "1"]
    if asked("ACCELERATE_USE_PARALLELISM_CONFIG") and split:
        shown = ", ".join(f"{name.lower()} {os.environ[name]}" for name in split)
        yield (
            f"{shown} of accelerate is not supported: remove parallelism_config, and shard with a "
            "ZeRO stage or FSDP2"
        )


def _sequence(config: TrainingConfig, world: int) -> Iterator[str]:
    """Yield a message where the processes do not form whole sequence groups."""
    size = config.sequence_parallel
    if world % size:
        yield (
            f"train.sequence_parallel {size} does not divide the {world} "
            f"process{'es' * (world > 1)}: start a multiple of {size}, or use a divisor"
        )


def _fsdp(world: int) -> Iterator[str]:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        yield f"fsdp_version {version} is not supported: use fsdp_version: 2"
    if world > 1 and asked("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        yield (
            "fsdp_cpu_ram_efficient_loading leaves the weights of all processes but the first "
            "empty until the training starts, and they are needed before: set it to false"
        )


def fields_beside(content: dict[str, Any], place: str, config: TrainingConfig) -> Iterator[str]:
    """Yield each field of `deepspeed_config` that contradicts the DeepSpeed JSON or the run.

    Args:
        content: the JSON as read.
        place: its file, for messages.
    """
    for name, path in FIELDS.items():
        value = value_of(name)
        if value is None:
            continue
        found = value_at(content, path)
        if str(found) != value:
            field = name.removeprefix(ZERO).lower()
            yield (
                f"{field} {value} of accelerate contradicts {path} {found!r} of {place}: the file "
                "decides; remove the field"
            )
    clipping = value_of("ACCELERATE_GRADIENT_CLIPPING")
    if clipping is not None and not _equal(clipping, config.max_grad_norm or 0.0):
        yield (
            f"gradient_clipping {clipping} of accelerate contradicts train.max_grad_norm "
            f"{config.max_grad_norm}: the run's configuration decides; remove the field"
        )


def _equal(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False
