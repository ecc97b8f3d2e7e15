"""From `TrainingConfig` to an `Accelerator`, and the few collectives that the rest may use.

The only place that starts the process group. On a CPU several processes talk through gloo; the
world size is compared with what the launcher said, because a bare `Accelerator()` there quietly
trains N separate runs.
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
from modern_llm.distributed import deepspeed_config, deepspeed_release, frozen_engine, launcher
from modern_llm.distributed.collectives import MEETING_H, Peers
from modern_llm.distributed.engine import DeepSpeedEngine, Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.health.heartbeat import waiting
from modern_llm.distributed.health.termination import within
from modern_llm.distributed.rendezvous.handshake import differences, join, whereabouts
from modern_llm.distributed.rendezvous.input_files import named_in
from modern_llm.distributed.shutdown import process_exit
from modern_llm.storage.fault_points import around

log = logging.getLogger(__name__)

RELEASE_S = 10.0
"""Seconds that freeing the models of a run may take at its end."""


class Runtime(Peers):
    """One process of a run: who it is, and how it agrees with the others.

    A context: its engines and frozen models are freed at the end.
    """

    def __init__(self, accelerator: Accelerator, config: TrainingConfig):
        self.accelerator, self.config = accelerator, config
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self.device: torch.device = accelerator.device
        self.stopping: str | None = None  # what all have agreed to stop for
        self.flag: Any = None  # a `consensus.Flag`: a decision to stop that is under way
        # Whether work beside the training is under way here, and whether none was anywhere when
        # the last decision to stop began: what ends at its own time is looked at in one step.
        self.busy: Callable[[], bool] = bool
        self.all_idle = False
        # What frees each engine and frozen model that is still in use, by its id.
        self._in_use: dict[int, Callable[[], None]] = {}

    @property
    def stage(self) -> int | None:
        """ZeRO stage, or None without DeepSpeed."""
        content = self.deepspeed_content
        return deepspeed_config.stage_of(content) if content else None

    @property
    def deepspeed_content(self) -> dict[str, Any]:
        """What DeepSpeed was given; empty without it."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return {} if plugin is None else plugin.deepspeed_config

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
        """Return `model` and its optimizer in the hands of DDP, DeepSpeed or nobody."""
        kind = Engine if self.stage is None else DeepSpeedEngine
        self._in_use[id(model)] = partial(deepspeed_release.forget, model)  # if it does not start
        with launcher.hidden():
            engine = kind(self.accelerator, model, optimizer)
        del self._in_use[id(model)]
        self._in_use[id(engine)] = engine.release
        return engine

    @property
    def forward_dtype(self) -> str:
        """What weights and activations of a forward are: part of what a log-prob depends on."""
        if self.stage and not self.deepspeed_content.get("torch_autocast", {}).get("enabled"):
            for name in ("bf16", "fp16"):
                if self.deepspeed_content[name]["enabled"]:
                    return f"{name}-weights"  # no autocast: norms and residuals are rounded too
        precision = self.config.precision
        return "float32" if precision == "no" else precision

    @property
    def shards_weights(self) -> bool:
        """Whether a forward gathers weights from other processes: ZeRO-3 and FSDP."""
        return self.stage == 3 or self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def rounds_weights(self) -> bool:
        """Whether the engine keeps weights in 16 bits for forwards, however they were loaded."""
        return self.forward_dtype.endswith("-weights")

    def freeze(self, module: nn.Module) -> nn.Module:
        """Return a module that is only asked, never trained, ready for forwards on this device.

        Every rank makes the same number of forwards with it, in step: under DeepSpeed it is sharded
        by an engine of its own.
        """
        if self.stage is None:
            return self._frozen(frozen_engine.freeze_parameters(module).to(self.device))
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        content = frozen_engine.engine_config(self.deepspeed_content, file, self.config)
        self._in_use[id(module)] = partial(deepspeed_release.forget, module)
        engine = frozen_engine.shard(module, content)
        del self._in_use[id(module)]
        return self._frozen(engine)

    def _frozen(self, module: nn.Module) -> nn.Module:
        self._in_use[id(module)] = partial(frozen_engine.release_frozen, module)
        return module

    def release(self, used: Engine | nn.Module) -> None:
        """Free what `prepare` or `freeze` returned."""
        self._in_use.pop(id(used))()

    def close(self) -> None:
        """Free every engine and frozen model that is still in use, however the run ended.

        In a thread with a deadline: after an error of this rank alone its device may wait for
        collectives that the others never join.
        """
        held, self._in_use = list(self._in_use.values()), {}

        def free() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # which device is in use is told by thread
            for release in held:
                try:
                    release()
                except Exception as error:  # another error may be on its way to the user
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
        """Let one process of each machine do the body before the others (who then find it done).

        An error on the first reaches everyone: the others would wait for a barrier that never
        comes.
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
    """Start the process group, if there is one, and return this process's part in it.

    Args:
        record: the run's whole configuration. It must be the same on every process, which is
            looked at before the first collective; and so must the local inputs that it names.

    Raises:
        ConfigError: a precision or sharding that this machine cannot do, or a DeepSpeed JSON that
            contradicts `config`.
        PeerError: processes are missing, or do not fit together.
    """
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else DeepSpeed warns; Accelerate imports it at export though nobody asked for it
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = launcher.asked("ACCELERATE_USE_DEEPSPEED")
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    launcher.refuse_contradictions(config, on_cpu=on_cpu, world=announced)
    plugin = _deepspeed_plugin(config) if deepspeed else None
    if (announced > 1 or deepspeed) and not dist.is_initialized():
        if not on_cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        join("gloo" if on_cpu else "nccl", _facts(record), timedelta(hours=MEETING_H))
    if dist.is_initialized():
        process_exit.handle_exit()
    before = PartialState._shared_state.get("distributed_type")
    # Stages run one after another in one process, each with a precision and perhaps a sharding of
    # its own; the process group of the first serves all.
    AcceleratorState._reset_state(
        reset_partial_state=(before == DistributedType.DEEPSPEED) != deepspeed
    )
    accelerator = _accelerator(config, plugin, on_cpu=on_cpu)
    if plugin is not None:
        # Transformers shards what it loads while this is set, and the probe needs whole weights.
        plugin.dschf = None
    _check_started(accelerator, announced, deepspeed=deepspeed)
    runtime = Runtime(accelerator, config)
    if record is not None and runtime.world > 1:
        _compare_inputs(runtime, record)
    return runtime


def _check_started(accelerator: Accelerator, announced: int, *, deepspeed: bool) -> None:
    """Raise `PeerError` where Accelerate started something else than requested."""
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
    """Start Accelerate with what the run says, whatever its variables say."""
    # Given to a single process, a backend makes it look for a group that does not exist.
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else None), _own_buffers()]
    with launcher.hidden():
        return Accelerator(
            mixed_precision=config.precision,
            # cpu=True under DeepSpeed would switch DeepSpeed off without a word; without it,
            # processes on a CPU would each believe to be alone.
            cpu=on_cpu and plugin is None,
            gradient_accumulation_steps=1,
            deepspeed_plugins=plugin,
            kwargs_handlers=handlers if dist.is_initialized() else [],
        )


def _facts(record: dict[str, Any] | None) -> dict[str, Any]:
    """Return what must agree between processes before they connect; reads no file."""
    if record is None:
        return {}
    places = {"output_dir", "resume"}  # may differ from node to node
    train = {name: value for name, value in record["train"].items() if name not in places}
    return {"configuration": {**record, "train": train}}


def _compare_inputs(runtime: Runtime, record: dict[str, Any]) -> None:
    """Refuse local inputs that differ between nodes; one process of each node reads them, while
    the others wait in a collective, however long that takes."""
    heartbeat.enter("comparing the input files")
    found: dict[str, str] | None = None
    with runtime.failing_together():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = named_in(record)
    mark = None if found is None else json.dumps(found, sort_keys=True)
    # All processes get one short mark of each node; the digests themselves only where they differ.
    marks = runtime.gather(mark and hashlib.sha256(mark.encode()).hexdigest())
    if len({mark for mark in marks if mark is not None}) > 1:
        notes = runtime.gather(whereabouts() | {"files": found})
        raise PeerError("; ".join(differences(notes, "rank")))


def _own_buffers() -> DistributedDataParallelKwargs:
    """Buffers are constants here; sending them would make every forward wait for all ranks."""
    # Accelerate knows no other name for it yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    return DistributedDataParallelKwargs(broadcast_buffers=False)


def _deepspeed_plugin(config: TrainingConfig) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for the JSON or the fields that `accelerate launch` was given."""
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            ["DeepSpeed was requested and is not installed: pip install modern-llm[deepspeed]"]
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it writes to stdout
    # Of calls between DeepSpeed and torch, once a tensor.
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")
    _leave_out_shared_memory_collectives(deepspeed)
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


def _leave_out_shared_memory_collectives(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling a C++ op that serves inference alone.

    It takes 45 to 150 s and a compiler, and a start that is killed meanwhile leaves a lock on which
    later ones wait. The table is private: without it the op is compiled, and all works the same.
    """
    table = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(table, dict) and "deepspeed_shm_comm" in table:
        table["deepspeed_shm_comm"] = False
