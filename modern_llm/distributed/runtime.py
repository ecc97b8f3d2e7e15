"""From `TrainingConfig` to an `Accelerator`, and the few collectives that the rest may use.

The only place that starts the process group. On a CPU several processes talk through gloo; the
world
size is compared with what the launcher said, because a bare `Accelerator()` there quietly trains N
separate runs. Called by the stages; nothing else asks about ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, PeerError

T = TypeVar("T")


class Runtime:
    """One process of a run: who it is, and how it agrees with the others."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every process."""
        self.accelerator.wait_for_everyone()

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Return the picklable `value` of every process, in rank order."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_main(self, value: T) -> T:
        """Return rank 0's `value` on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """Let rank 0 do `work` while the others wait; all get its result, or its error."""
        result: T | None = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:
                failure = error
        self.raise_together(failure)
        return self.from_main(result)  # type: ignore[return-value]

    def raise_together(self, failure: BaseException | None) -> None:
        """Meet the others; raise this process's `failure`, or else the first that another one had.

        Called where each did work of its own before a collective: who failed alone would leave the
        others waiting in it.
        """
        failures = [f for f in self.gather(_portable(failure)) if f is not None]
        if failure is not None:
            raise failure
        if failures:
            raise failures[0]

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

    def freeze(self, module: nn.Module) -> nn.Module:
        """Return a module that is only asked, never trained, ready for forwards on this device.

        Every rank makes the same number of forwards with it, in step: it may be sharded.
        """
        return module.to(self.device).eval().requires_grad_(False)

    def release(self, module: nn.Module) -> None:
        """Free what a frozen module holds."""
        module.to("meta")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def agree(self, value: str, what: str) -> None:
        """Raise `PeerError` on every process unless all have the same `value`."""
        values = self.gather(value)
        if len(set(values)) > 1:
            differing = ", ".join(f"rank {rank}: {v[:16]}" for rank, v in enumerate(values))
            raise PeerError(
                f"processes disagree on {what} ({differing}); give all of them the same files"
            )


def start(config: TrainingConfig) -> Runtime:
    """Start the process group, if there is one, and return this process's part in it.

    Raises:
        ConfigError: a precision that this machine cannot compute in.
        PeerError: the world is not of the size that the launcher announced.
    """
    on_cpu = not torch.cuda.is_available()
    if config.precision == "fp16" and on_cpu:
        raise ConfigError(
            ["train.mixed_precision fp16 needs a GPU: use bf16 or no on this machine"]
        )
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # cpu=True under DeepSpeed would switch DeepSpeed off without a word; without it, processes on a
    # CPU would each believe to be alone.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", config.precision)
    if launched != config.precision and launched != "no":
        raise ConfigError(
            [
                f"accelerate launch says mixed precision {launched}, train.mixed_precision says "
                f"{config.mixed_precision}: say the same in both"
            ]
        )
    announced = int(os.environ.get("WORLD_SIZE", "1"))
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu else None,
        # Long enough for one process to tokenise while the others wait.
        timeout=timedelta(hours=3),
    )
    # Stages run one after another in one process, each with a precision of its own; the process
    # group of the first serves all.
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=on_cpu and not deepspeed,
        gradient_accumulation_steps=1,
        # Given to a single process, a backend makes it look for a group that does not exist.
        kwargs_handlers=[group] if announced > 1 else [],
    )
    if accelerator.num_processes != announced:
        raise PeerError(
            f"the launcher announced {announced} processes, the process group has "
            f"{accelerator.num_processes}; start with torchrun --nproc_per_node {announced}"
        )
    return Runtime(accelerator)


def _portable(error: BaseException | None) -> BaseException | None:
    """Return an error that survives pickling: foreign ones may hold what cannot be sent."""
    if error is None:
        return None
    if isinstance(error, ConfigError):
        return ConfigError(error.problems)
    if type(error).__module__.startswith("modern_llm.config"):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
