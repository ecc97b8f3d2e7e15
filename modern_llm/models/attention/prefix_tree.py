"""Attention within prefix trees: a token sees only its own response and what is before it there.

One function, registered with `transformers` under `TREE_ATTENTION`, is used by every layer that
calls its `AttentionInterface`. Scaling, sliding window and soft-cap come from the layer; the
segments are the keyword `tree` of the model call. It is also the packing mask: trees of one row
never see each other. `probe` finds models that bypass the interface.

Three backends compute the same: `blocks` (CPU: parts of rows, see `cpu_blocks`), `flex` (CUDA:
FlexAttention with a block mask, see `flex`) and `mask` (SDPA with a dense mask, any device).

Letters: R rows, L tokens of a row, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from modern_llm.models.attention import flex
from modern_llm.models.attention.cpu_blocks import (
    MERGE_BELOW,
    Block,
    BlockAttention,
    additive,
    blockwise,
    find_blocks,
    has_kernel,
    takes_groups,
)
from modern_llm.models.attention.paths import paths
from modern_llm.models.attention.sequence import SequenceGroup, exchanged, repeats

TREE_ATTENTION = "modern_llm_tree"

Backend = Literal["blocks", "flex", "mask"]
# Mask of one window by backend: parts of rows, a block mask, or a dense mask (R, 1, L, L).
TreeMask = tuple[Block, ...] | flex.BlockMask | Tensor


class Call(NamedTuple):
    """What a layer passes to its attention, except the tensors."""

    heads: int
    key_heads: int
    width: int
    value_width: int
    scaling: float | None
    softcap: float | None
    window: int | None


def backends(device: torch.device) -> tuple[Backend, ...]:
    """Return the backends to try on `device`, the fastest first."""
    if device.type == "cuda":
        return ("flex", "mask")
    return ("blocks", "mask") if device.type == "cpu" and has_kernel() else ("mask",)


def visible(segments: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Return which tokens are visible, (R, L, L) booleans [row, query, key].

    Args:
        segments: (R, L, 2) integers, [tree, branch] of each token. Branch 0 is the prefix, the
            others are responses. Tree -1 is padding, which sees only itself: the softmax of a token
            without any visible key would be NaN. Or (R, L, 3) integers, [tree, node, last]: nodes
            are numbered in the order of the row, `last` is the last node below the token's.
        positions: (R, L) integers. Windows are measured in positions, which continue after the
            prefix in each response.
        window: positions that a token looks back, itself included; None for all.
    """
    wrong = segments.ndim != 3 or segments.shape[:2] != positions.shape
    if wrong or segments.shape[2] not in (2, 3):
        raise ValueError(
            f"segments must be (R, L, 2) or (R, L, 3), positions (R, L), got "
            f"{tuple(segments.shape)}, {tuple(positions.shape)}"
        )
    tree, node, last = paths(segments)
    length = tree.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tree.device).tril_()
    same_tree = (tree[:, :, None] == tree[:, None, :]) & (tree >= 0)[:, None, :]
    above = (node[:, None, :] <= node[:, :, None]) & (node[:, :, None] <= last[:, None, :])
    seen = causal & same_tree & above
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen | torch.eye(length, dtype=torch.bool, device=tree.device)


class TreeMasks(dict[int | None, TreeMask]):
    """Masks of layers that attend within trees, by sliding window; see `Backend`.

    Masks are made on first use, which tells the probe the windows of the model. Later all of them
    are made before the forward, so that compiled layers get a plain dictionary.

    Args:
        merge_below: see `cpu_blocks.find_blocks`.

    Attributes:
        needed: states that the last layer must compute (`last_layer.Needed`); None is all.
        calls: the calls of the layers so far.
    """

    needed: object = None

    def __init__(
        self,
        segments: Tensor,
        positions: Tensor,
        dtype: torch.dtype,
        backend: Backend = "mask",
        merge_below: int = MERGE_BELOW,
    ):
        super().__init__()
        self.calls: set[Call] = set()
        self._where = segments, positions
        self._dtype, self._backend, self._merge_below = dtype, backend, merge_below

    def __missing__(self, window: int | None) -> TreeMask:
        segments, positions = self._where
        if self._backend == "blocks":
            self[window] = find_blocks(
                segments, positions, window, self._dtype, visible, self._merge_below
            )
        elif self._backend == "flex":
            self[window] = flex.block_mask(segments, positions, window)
        else:
            self[window] = additive(visible(segments, positions, window), self._dtype).unsqueeze(1)
        return self[window]


class Parts:
    """Masks of the `blocks` backend for layers that may be compiled.

    Number and size of the parts differ between forwards, so a compiler would make a graph for each
    batch. This class hides them from it; in a dictionary it would inspect them.
    """

    def __init__(self, masks: Mapping[int | None, TreeMask]):
        self._masks = masks

    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *of: object) -> tuple:
        """Attend as `tree_attention` does; `of` are the settings of the layer."""
        return _attend(query, key, value, self._masks, *of)


class SplitRows:
    """Masks of whole rows, of which each process of a group has a part (`sequence`)."""

    def __init__(self, masks: Mapping[int | None, TreeMask], group: SequenceGroup):
        self._masks, self._group = masks, group

    @torch.compiler.disable
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *of: object) -> tuple:
        """Attend as `tree_attention` does, to the tokens of all processes."""
        query, key, value = _as_autocast(query, key, value)
        times = repeats(key.shape[1], self._group.size)
        if times > 1:
            key, value = (each.repeat_interleave(times, dim=1) for each in (key, value))
        heads = (exchanged(each, self._group) for each in (query, key, value))
        out, weights = _attend(*heads, self._masks, *of)
        return exchanged(out, self._group), weights


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    tree: Mapping[int | None, TreeMask] | Parts | SplitRows | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within the trees of `tree`.

    Args:
        query: (R, H, L, E); key, value: (R, H / groups, L, E).
        scaling, dropout, sliding_window, softcap: settings of the layer.
        tree: mask of each window, see `TreeMasks`.

    Returns:
        (R, L, H, E) and no weights.
    """
    if tree is None:
        raise ValueError(
            "the tree attention was called without `tree`: call the model through TokenScorer, or "
            "set another attention with model.set_attn_implementation('sdpa')"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not part of the tree attention: use separate rows")
    if isinstance(tree, TreeMasks):
        heads, (_, key_heads, _, width) = query.shape[1], key.shape
        tree.calls.add(
            Call(heads, key_heads, width, value.shape[3], scaling, softcap, sliding_window)
        )
    if isinstance(tree, (Parts, SplitRows)):
        return tree.attend(query, key, value, scaling, dropout, sliding_window, softcap)
    return _attend(query, key, value, tree, scaling, dropout, sliding_window, softcap)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tree: Mapping[int | None, TreeMask],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> tuple[Tensor, None]:
    mask = tree[sliding_window]
    query, key, value = _as_autocast(query, key, value)
    if isinstance(mask, flex.BlockMask):
        out = flex.attend(query, key, value, mask, scaling, softcap, dropout)
        return out.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    in_parts = not isinstance(mask, Tensor) and softcap is None and not dropout
    if groups > 1 and not (in_parts and takes_groups()):
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)

    def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        mask = mask.to(query.dtype)
        if softcap is not None:
            return _softcapped(query, key, value, mask, scaling, softcap, dropout)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )

    if in_parts:
        out = BlockAttention.apply(query, key, value, mask, scaling)
    elif isinstance(mask, Tensor):
        out = dense(query, key, value, mask)
    else:
        out = blockwise(query, key, value, mask, dense)
    return out.transpose(1, 2).contiguous(), None


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert as SDPA does under autocast: rotary tables leave queries and keys in float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """softmax(softcap * tanh(scaling q k^T / softcap) + mask) v (Gemma 2); SDPA has no soft-cap."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout)
    return torch.matmul(weights, value)


def register_tree_attention() -> None:
    """Register `TREE_ATTENTION` with `transformers`; repeated calls are harmless.

    It must have no mask function, so that `transformers` builds no mask of its own.
    """
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
