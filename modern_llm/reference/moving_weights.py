"""Weights of a moving reference: a copy of what is trained, on the host.

Under ZeRO and FSDP every rank keeps the pieces that it updates. For a forward of the reference they
take the place of the policy's weights, so that the device never holds a second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from modern_llm.config.errors import Stopped
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.optimizer_shards import pieces
from modern_llm.models.run_checkpoint import Shards, whole_shape

FILE = "reference"
"""Kind of file in a checkpoint."""


class MovingWeights:
    """The trained weights as the reference has them.

    Attributes:
        tensors: parameter -> (n,) this rank's piece, float32 on the host. They are replaced and
            never changed in place, so that a background save may read them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def copy(self, engine: Engine) -> None:
        """Take the policy's weights."""
        self.tensors = _on_host(engine)

    def load(self, engine: Engine, checkpoint: Path) -> None:
        """Read this rank's pieces of a checkpoint, which any number of ranks may have written."""
        stored = Shards(checkpoint, FILE)
        parameters = dict(engine.inner.named_parameters())
        self.tensors = {}
        for piece in pieces(engine):
            end, shape = piece.start + piece.data.numel(), whole_shape(parameters[piece.name])
            found = stored.read(piece.name, piece.start, end, shape, piece.dtype)
            # A copy: the file's memory map would hold the checkpoint after its removal.
            self.tensors[piece.name] = found.clone()
            heartbeat.tick()

    @torch.no_grad()
    def mix(self, engine: Engine, alpha: float) -> None:
        """Become `alpha` * policy + (1 - `alpha`) * reference (TR-DPO, equation 5)."""
        policy = _on_host(engine)
        self.tensors = {n: torch.lerp(old, policy[n], alpha) for n, old in self.tensors.items()}

    @contextmanager
    def in_place(self, engine: Engine) -> Iterator[None]:
        """Put these weights in the policy's place for the `with` block; a collective.

        The policy's own return bit for bit, also if a signal stops the block. After another error
        they do not: other ranks may never reach the collective, and nothing is saved then.
        """
        policy = _on_host(engine)
        _write(engine, self.tensors)
        try:
            yield
        except Stopped:
            _write(engine, policy)
            raise
        _write(engine, policy)


def _on_host(engine: Engine) -> dict[str, Tensor]:
    """Return copies of this rank's pieces."""
    found = {}
    for piece in pieces(engine):
        found[piece.name] = piece.weight.to("cpu", copy=True)
        heartbeat.tick()
    return found


@torch.no_grad()
def _write(engine: Engine, tensors: dict[str, Tensor]) -> None:
    for piece in pieces(engine):
        piece.set_weight(tensors[piece.name])
        heartbeat.tick()
    engine.use_written_weights()
