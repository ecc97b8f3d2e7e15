"""Start of the process group and of Accelerate, and the engines of a run.

On a CPU processes communicate through gloo. The world size is compared with the launcher's, because
a plain `Accelerator()` would silently train N separate runs there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)
from torch import nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, PeerError
from modern_llm.distributed import (
    deepspeed_config,
    deepspeed_release,
    frozen_engine,
    fsdp,
    launcher,
    sharded_start,
)
from modern_llm.distributed.collectives import MEETING_H, Peers
from modern_llm.distributed.engine import DeepSpeedEngine, Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.heartbeat import waiting
from modern_llm.distributed.health.termination import within
from modern_llm.distributed.rendezvous.handshake import differences, join, whereabouts
from modern_llm.distributed.rendezvous.input_files import named_in
from modern_llm.distributed.rendezvous.interfaces import check_interface
from modern_llm.distributed.sequence_group import SequenceGroup, sequence_group
from modern_llm.distributed.shutdown import process_exit
from modern_llm.storage.fault_points import around

log = logging.getLogger(__name__)

RELEASE_S = 10.0
"""Seconds that freeing the models of a run may take at its end."""


class Runtime(Peers):
    """One process of a run: rank, device, collectives, engines and frozen models.

    A context manager that frees its engines and frozen models at the end.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig):
        self.accelerator, self.config = accelerator, config
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self.device: torch.device = accelerator.device
        self.sequence: SequenceGroup | None = None
        self.stopping: str | None = None  # the signal that all ranks have agreed to stop for
        self.flag: Any = None  # a `consensus.Flag`: the vote in progress
        # `busy`: whether a background save runs here. `all_idle`: whether none ran on any rank at
        # the last vote, so that all ranks collect a finished save at the same step.
        self.busy: Callable[[], bool] = bool
        self.all_idle = False
        # Id of each engine and frozen model in use -> function that frees it.
        self._in_use: dict[int, Callable[[], None]] = {}

    @property
    def stage(self) -> int | None:
        """ZeRO stage, None without DeepSpeed."""
        content = self.deepspeed_content
        return deepspeed_config.stage_of(content) if content else None

    @property
    def deepspeed_content(self) -> dict[str, Any]:
        """DeepSpeed's configuration; empty without DeepSpeed."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return {} if plugin is None else plugin.deepspeed_config

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
        """Return an engine with `model` and its optimizer, under DDP, FSDP, DeepSpeed or none."""
        kind = Engine if self.stage is None else DeepSpeedEngine
        self._in_use[id(model)] = partial(deepspeed_release.forget, model)  # if it does not start
        if self.stage == 3:
            sharded_start.shard_for_zero3(model, self.deepspeed_content, self.device)
        readers = sharded_start.take_readers(model) if self.shards_weights else {}
        sharded_start.refuse_unread(model)
        with launcher.hidden():
            engine = kind(self.accelerator, model, optimizer)
        sharded_start.fill(model, readers)
        del self._in_use[id(model)]
        self._in_use[id(engine)] = engine.release
        return engine

    @property
    def forward_dtype(self) -> str:
        """Precision of weights and activations in a forward; log-probs depend on it."""
        if self.stage and not self.deepspeed_content.get("torch_autocast", {}).get("enabled"):
            for name in ("bf16", "fp16"):
                if self.deepspeed_content[name]["enabled"]:
                    return f"{name}-weights"  # without autocast norms and residuals are rounded too
        precision = self.config.precision
        if self.config.weights == "bfloat16":
            return "bf16-weights"
        if precision != "no" and self.accelerator.distributed_type == DistributedType.FSDP:
            return f"{precision}-autocast-weights"  # both, see `fsdp.plugin`
        return "float32" if precision == "no" else precision

    @property
    def attention_dtype(self) -> torch.dtype:
        """Dtype of queries, keys and values in a forward."""
        return sharded_start.DTYPES.get(self.config.precision, torch.float32)

    @property
    def shards_weights(self) -> bool:
        """Whether a forward gathers weights from other processes (ZeRO-3, FSDP)."""
        return self.stage == 3 or self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def shards_frozen(self) -> bool:
        """Whether a frozen model is sharded: under DeepSpeed at every stage, and under FSDP."""
        return self.stage is not None or (self.shards_weights and self.world > 1)

    @property
    def rounds_weights(self) -> bool:
        """Whether the engine converts the weights of forwards to 16 bits."""
        return self.forward_dtype.endswith("-weights")

    def freeze(self, module: nn.Module) -> nn.Module:
        """Return a frozen module, ready for forwards on this device.

        Under DeepSpeed and FSDP it is sharded by its own engine, so every rank must do the same
        number of forwards.
        """
        if self.stage is None and self.shards_frozen:
            precision = self.config.precision
            return self._frozen(frozen_engine.shard_by_fsdp(self.accelerator, module, precision))
        if self.stage is None:
            sharded_start.refuse_unread(module)
            if self.rounds_weights:  # as in the model that trains
                frozen_engine.round_parameters(module, self.config.precision)
            frozen_engine.freeze_parameters(module)
            frozen_engine.read_rounded(module, self.config.precision, self.device)
            return self._frozen(module)
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        content = frozen_engine.engine_config(self.deepspeed_content, file, self.config)
        self._in_use[id(module)] = partial(deepspeed_release.forget, module)
        engine = frozen_engine.shard(module, content, self.device)
        del self._in_use[id(module)]
        return self._frozen(engine)

    def _frozen(self, module: nn.Module) -> nn.Module:
        self._in_use[id(module)] = partial(frozen_engine.release_frozen, module)
        return module

    def release(self, used: Engine | nn.Module) -> None:
        """Free what `prepare` or `freeze` returned."""
        self._in_use.pop(id(used))()

    def close(self) -> None:
        """Free every engine and frozen model that is still in use, also after an error.

        In a thread with a deadline, because after an error of this rank alone its device may wait
        for collectives that the other ranks never enter.
        """
        held, self._in_use = list(self._in_use.values()), {}

        def free() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # the current device is set per thread
            for release in held:
                try:
                    release()
                except Exception as error:  # must not hide the error that ended the run
                    log.warning("warning: a model could not be freed: %s", error)

        if held:
            within(RELEASE_S, free)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def barrier(self) -> None:
        """Wait for every process."""
        with around("collective.barrier"), waiting():
            self.accelerator.wait_for_everyone()

    @contextmanager
    def one_per_machine_first(self) -> Iterator[None]:
        """Run the `with` block on one process of each machine first, then on the others.

        An error of a first process is raised on all, because the others would wait forever.
        """
        failure: BaseException | None = None
        first = self.accelerator.is_local_main_process
        if first:
            try:
                yield
            except Exception as error:
                failure = error
        self.raise_together(failure)
        if not first:
            yield


def start(config: TrainingConfig, record: dict[str, Any] | None = None) -> Runtime:
    """Start the process group, if there is one, and return this process's `Runtime`.

    Args:
        record: the run's whole configuration. It must be equal on every process, as must the local
            input files that it names; both are checked before any work.

    Raises:
        ConfigError: this machine does not support the precision or sharding, or the DeepSpeed JSON
            contradicts `config`.
        PeerError: processes are missing, or have different versions or inputs.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else DeepSpeed warns, which Accelerate imports at export even if it is not used
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        launcher.grow_segments()
    deepspeed = launcher.asked("ACCELERATE_USE_DEEPSPEED")
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    launcher.refuse_contradictions(config, on_cpu=on_cpu, world=announced)
    plugin = _deepspeed_plugin(config) if deepspeed else None
    if (announced > 1 or deepspeed) and not dist.is_initialized():
        check_interface()
        if not on_cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        join("gloo" if on_cpu else "nccl", _facts(record), timedelta(hours=MEETING_H))
    if dist.is_initialized():
        process_exit.handle_exit()
    before = PartialState._shared_state.get("distributed_type")
    # Several stages may run in one process, each with its own precision and sharding; they share
    # the process group of the first.
    AcceleratorState._reset_state(
        reset_partial_state=(before == DistributedType.DEEPSPEED) != deepspeed
    )
    accelerator = _accelerator(config, plugin, on_cpu=on_cpu)
    if plugin is not None:
        # While this is set, transformers shards the models it loads; the probe needs whole weights.
        plugin.dschf = None
    _check_started(accelerator, announced, deepspeed=deepspeed)
    runtime = Runtime(accelerator, config)
    runtime.readers = config.sequence_parallel
    runtime.sequence = sequence_group(runtime.readers)
    if runtime.is_main:
        log.info("%s", _start_line(runtime))
        if warning := launcher.missing_processes(runtime.world):
            log.warning("warning: %s", warning)
    if record is not None and runtime.world > 1:
        _compare_inputs(runtime, record)
    return runtime


def _start_line(runtime: Runtime) -> str:
    """Return e.g. `processes: 8 on 1 machine, NVIDIA H100, precision bf16, ZeRO-2`."""
    machines = max(1, runtime.world // int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world)))
    cuda = runtime.device.type == "cuda"
    parts = [
        f"processes: {runtime.world} on {machines} machine{'s' * (machines > 1)}",
        torch.cuda.get_device_name(runtime.device) if cuda else runtime.device.type,
        f"precision {runtime.forward_dtype}",
    ]
    if runtime.sequence is not None:
        parts.append(f"rows split over {runtime.sequence.size}")
    if runtime.stage is not None:
        parts.append(f"ZeRO-{runtime.stage}")
    elif runtime.accelerator.distributed_type == DistributedType.FSDP:
        parts.append("FSDP")
    elif cuda and runtime.world == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        parts.append(f"one of {count} GPUs is used (torchrun --nproc_per_node {count} uses all)")
    return ", ".join(parts)


def _check_started(accelerator: Accelerator, announced: int, *, deepspeed: bool) -> None:
    """Raise `PeerError` if Accelerate started with another backend or world size."""
    if deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise PeerError(
            f"DeepSpeed was requested, but Accelerate started {accelerator.distributed_type}: a "
            "bug of this combination of versions, please report it"
        )
    if accelerator.num_processes != announced:
        raise PeerError(
            f"the launcher announced {announced} processes, the process group has "
            f"{accelerator.num_processes}; start with torchrun --nproc_per_node {announced}"
        )


def _accelerator(
    config: TrainingConfig, plugin: DeepSpeedPlugin | None, *, on_cpu: bool
) -> Accelerator:
    """Start Accelerate with the settings of the run; its environment variables are hidden."""
    # With a backend, a single process would look for a group that does not exist.
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else None), _own_buffers()]
    with launcher.hidden():
        return Accelerator(
            # Without autocast where the weights themselves are of 16 bits.
            mixed_precision="no" if config.weights == "bfloat16" else config.precision,
            # cpu=True silently switches DeepSpeed off; without DeepSpeed, CPU processes need it, or
            # each trains alone.
            cpu=on_cpu and plugin is None,
            gradient_accumulation_steps=1,
            deepspeed_plugins=plugin,
            fsdp_plugin=fsdp.plugin(config) if launcher.asked("ACCELERATE_USE_FSDP") else None,
            kwargs_handlers=handlers if dist.is_initialized() else [],
        )


def _facts(record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings that must agree before processes connect, without reading files."""
    if record is None:
        return {}
    places = {"output_dir", "resume"}  # may differ from node to node
    train = {name: value for name, value in record["train"].items() if name not in places}
    return {"configuration": {**record, "train": train}}


def _compare_inputs(runtime: Runtime, record: dict[str, Any]) -> None:
    """Refuse local input files that differ between nodes; one process of each node reads them."""
    heartbeat.enter("comparing the input files")
    found: dict[str, str] | None = None
    with runtime.failing_together():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = named_in(record)
    mark = None if found is None else json.dumps(found, sort_keys=True)
    # All processes get one short digest per node; those of single files only if nodes differ.
    marks = runtime.gather(mark and hashlib.sha256(mark.encode()).hexdigest())
    if len({mark for mark in marks if mark is not None}) > 1:
        notes = runtime.gather(whereabouts() | {"files": found})
        raise PeerError("; ".join(differences(notes, "rank")))


def _own_buffers() -> DistributedDataParallelKwargs:
    """Do not broadcast buffers: they are constants, and every forward would wait for all ranks.

    Gradients are views of the buckets in which they are reduced, so that they exist once.
    """
    # Accelerate has no other name for the option yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)


def _deepspeed_plugin(config: TrainingConfig) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for the JSON or the fields passed to `accelerate launch`."""
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            ["DeepSpeed was requested and is not installed: pip install modern-llm[deepspeed]"]
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout
    # DeepSpeed's calls to torch warn once per tensor.
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")
    _skip_shared_memory_op(deepspeed)
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named != "none":
        content, place = deepspeed_config.read_file(named), named
    else:
        place = "deepspeed_config of accelerate"
        try:
            fields = DeepSpeedPlugin(gradient_clipping=0.0).deepspeed_config
        except ValueError as error:
            raise ConfigError([f"{place}: {' '.join(str(error).split())}"]) from error
        content = {"zero_optimization": fields["zero_optimization"]}
    if problems := list(launcher.fields_beside(content, place, config)):
        raise ConfigError(problems)
    content = deepspeed_config.resolve(content, config, place)
    with launcher.hidden():
        return DeepSpeedPlugin(hf_ds_config=content, zero3_init_flag=False)


def _skip_shared_memory_op(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling a C++ op that only inference needs.

    Compiling takes 45 to 150 s, and a process killed meanwhile leaves a lock that later ones wait
    for. The table is private: in a version without it the op is compiled, and nothing else changes.
    """
    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False
