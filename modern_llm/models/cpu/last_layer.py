"""Narrow last layer: compute only the states that predict a target.

After the last attention every token is computed alone, and the states of a prompt are unused there.
So the gated product of that layer runs on the needed states only, and its attention only on the
parts that hold one of them, forward and backward. `probe` installs it and checks the whole model;
`TokenScorer` selects the states.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modern_llm.models.attention.prefix_tree import TreeMask, TreeMasks
from modern_llm.models.cpu.fused_ops import is_gated_product, numbers, same, set_forward

# Above this share of needed tokens, selecting them costs more than it saves.
WORTH = 0.8


class FewerParts(dict[int | None, TreeMask]):
    """Masks of `whole` without the parts of rows that contain no needed query.

    Args:
        needed: (R, L) booleans.
    """

    def __init__(self, whole: TreeMasks, needed: Tensor):
        super().__init__()
        self._whole, self._needed = whole, needed

    def __missing__(self, window: int | None) -> TreeMask:
        mask = self._whole[window]
        if isinstance(mask, tuple):
            needed = self._needed
            mask = tuple(b for b in mask if bool(needed[b.row, b.start : b.stop].any()))
        self[window] = mask
        return mask


@dataclass(frozen=True)
class Needed:
    """Work of the last layer in one forward.

    Attributes:
        states: (N,) flat indices into R * L, without repetition.
        masks: masks of its attention.
    """

    states: Tensor
    masks: FewerParts


def needed_of(masks: TreeMasks, sources: Tensor, shape: torch.Size) -> Needed | None:
    """Return the states that the last layer must compute, or None if nothing is saved.

    Args:
        sources: flat indices of the states that predict a target.
        shape: (R, L).
    """
    if len(sources) == 0:
        return None
    states = torch.unique(sources)
    if len(states) > WORTH * shape.numel():
        return None
    needed = torch.zeros(shape, dtype=torch.bool, device=sources.device)
    needed.view(-1)[states] = True
    return Needed(states, FewerParts(masks, needed))


def narrows(model: nn.Module) -> bool:
    """Return whether `narrow_last_layer` was applied to `model`."""
    mlp = getattr(_last_layer(model), "mlp", None)
    return hasattr(getattr(mlp, "forward", None), "narrow")


@torch.no_grad()
def narrow_last_layer(model: nn.Module) -> bool:
    """Patch the last layer in place to compute only the states in `tree.needed`.

    Returns:
        False, without any change, if its feed-forward may not treat each token alone.
    """
    layer = _last_layer(model)
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or not is_gated_product(mlp):
        return False
    x = numbers(2, 3, mlp.gate_proj.in_features)
    if not same(mlp(x)[:, 1:], mlp(x[:, 1:])):
        return False
    # Channel from the attention to the gated product, which gets only a tensor. Both are patched,
    # not the layer, because recomputation starts inside the layer. Thread-local, because several
    # threads may run one model.
    here = threading.local()
    attend, multiply = attention.forward.__func__, mlp.forward.__func__

    def narrow_attention(self: nn.Module, *args: object, **kwargs: object) -> object:
        needed = getattr(kwargs.get("tree"), "needed", None)
        here.states = None
        if needed is None:
            return attend(self, *args, **kwargs)
        out = attend(self, *args, **(kwargs | {"tree": needed.masks}))
        here.states = needed.states
        return out

    def narrow_product(self: nn.Module, x: Tensor) -> Tensor:
        states, here.states = getattr(here, "states", None), None
        if states is None:
            return narrow_product.inner(self, x)
        flat = x.flatten(0, -2)
        found = narrow_product.inner(self, flat.index_select(0, states))
        out = found.new_zeros(len(flat), found.shape[-1]).index_copy(0, states, found)
        return out.view(*x.shape[:-1], -1)

    set_forward(attention, narrow_attention)
    narrow_product.narrow, narrow_product.inner = True, multiply
    set_forward(mlp, narrow_product)
    return True


def _last_layer(model: nn.Module) -> nn.Module | None:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)[-1] if lists else None
