"""Several optimizers as one, and bfloat16 weights that are trained as exactly as float32 ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUCKET = 1 << 26
"""Elements whose float32 weights `SplitWeights` holds at once: 256 MiB."""


class LinkedOptimizers(torch.optim.Optimizer):
    """Optimizers of disjoint parameters that step together and share one list of groups.

    Groups and state are those of the parts, so a learning rate set here is theirs.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]):
        self.parts = list(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """Share groups and state; a part makes new ones when it loads a state."""
        state = self.parts[0].state
        for part in self.parts[1:]:
            state.update(part.state)
            part.state = state
        self.state = state
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step every part; they have no closure."""
        if closure is not None:
            raise ValueError("several optimizers cannot evaluate a closure together")
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._link()


class SplitWeights(LinkedOptimizers):
    """An optimizer of float32 weights whose upper halves are the model's bfloat16 weights.

    A float32 number is a bfloat16 one, rounded, and 16 bits that tell the difference. The model
    holds the first, `rest` the second, and a step joins them: no update is too small to count, at 4
    bytes a weight. Kahan's compensation needs as many bytes and is not exact. The optimizer's own
    parameters ("masters") have memory only while their bucket is stepped.

    Args:
        optimizer: of the masters that `make_masters` returned.
    """

    def __init__(self, masters: dict[nn.Parameter, nn.Parameter], optimizer: torch.optim.Optimizer):
        super().__init__([optimizer])
        self.masters = masters
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step the masters, bucket by bucket, with the gradients of the model's parameters."""
        for bucket in self._buckets():
            for parameter, master in bucket:
                master.data = join_halves(parameter.data, parameter.rest)
                master.grad = parameter.grad
            super().step(closure)
            for parameter, master in bucket:
                write_halves(parameter.data, parameter.rest, master.data)
                master.grad = None
                _free(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the model's parameters."""
        for parameter in self.masters:
            parameter.grad = None

    def _buckets(self) -> Iterator[list[tuple[nn.Parameter, nn.Parameter]]]:
        bucket: list[tuple[nn.Parameter, nn.Parameter]] = []
        for parameter, master in self.masters.items():
            if parameter.grad is None:
                continue
            if bucket and sum(p.numel() for p, _ in bucket) + parameter.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append((parameter, master))
        if bucket:
            yield bucket


@torch.no_grad()
def make_masters(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Convert float32 parameters to bfloat16, and return a master for each trained one.

    Gradients are summed in float32 over micro-batches, and are reduced so over processes.

    Returns:
        Parameter -> float32 parameter of its shape, without memory of its own. The parameter has
        its 16 bits in `rest` and its master in `master`.
    """
    masters = {}
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        whole = parameter.data
        parameter.data = whole.to(torch.bfloat16)
        if parameter.requires_grad:
            parameter.rest = torch.empty_like(parameter.data, dtype=torch.int16)
            write_halves(parameter.data, parameter.rest, whole.float())
            parameter.grad_dtype = torch.float32
            parameter.master = nn.Parameter(torch.zeros((), device=whole.device))
            _free(parameter.master, whole)
            masters[parameter] = parameter.master
    return masters


def _free(master: nn.Parameter, like: Tensor | None = None) -> None:
    """Give a master one element of memory, with the shape of `like` or its own."""
    data = master.data if like is None else like
    master.data = torch.zeros((), device=data.device).expand(data.shape)


def write_halves(upper: Tensor, rest: Tensor, whole: Tensor) -> None:
    """Write float32 weights into bfloat16 ones and the 16 bits (int16) that tell the difference."""
    bits = whole.view(torch.int32)
    # Half of the last place is added first, so that ties round up: to even they would need 17 bits.
    top = (bits + 0x8000).bitwise_right_shift_(16)
    upper.view(torch.int16).copy_(top)
    rest.copy_(bits - top.bitwise_left_shift_(16))


def join_halves(upper: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 weights of bfloat16 ones and their 16 bits (int16), in new memory."""
    bits = upper.view(torch.int16).to(torch.int32).bitwise_left_shift_(16)
    return bits.add_(rest).view(torch.float32)
