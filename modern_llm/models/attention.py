"""Attention for rows that hold trees: a token sees its own branch and the trunk before it, nothing
else.

One function, registered with `transformers` under `TREE_ATTENTION`, serves every layer of every
architecture that asks its `AttentionInterface`: scaling, sliding window and soft-cap come from the
layer, the segments come as the keyword `tree` of the model call. It is also the packing mask: trees
of one row never see each other. Models that bypass the interface are found by `probe`.

Letters: R rows, L tokens of a row, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

TREE_ATTENTION = "modern_llm_tree"


def visible(segments: Tensor, positions: Tensor, window: int | None = None) -> Tensor:
    """Return who sees whom, (R, L, L) booleans [row, query, key].

    Args:
        segments: (R, L, 2) integers, [tree, branch] of each token. Branch 0 is the trunk (the
            prompt). Tree -1 is padding, which sees only itself: a row without any visible key
            would be not-a-number.
        positions: (R, L) integers; a window is measured in positions, which restart at a branch.
        window: positions that a token looks back, itself included; None for all.
    """
    if segments.ndim != 3 or segments.shape[:2] != positions.shape or segments.shape[2] != 2:
        raise ValueError(
            f"segments must be (R, L, 2), positions (R, L), got {tuple(segments.shape)}, "
            f"{tuple(positions.shape)}"
        )
    tree, branch = segments.unbind(-1)
    length = tree.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=tree.device).tril_()
    same_tree = (tree[:, :, None] == tree[:, None, :]) & (tree >= 0)[:, None, :]
    on_path = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    seen = causal & same_tree & on_path
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    return seen | torch.eye(length, dtype=torch.bool, device=tree.device)


class TreeMasks(dict[int | None, Tensor]):
    """Additive masks (R, 1, L, L) by sliding window: 0 where visible, -inf elsewhere.

    Floats, because SDPA would convert booleans in every layer. A window that was not asked for yet
    is made when a layer asks. That serves the probe; later all known windows are made before the
    forward, so that compiled layers see a plain dictionary of tensors.
    """

    def __init__(self, segments: Tensor, positions: Tensor, dtype: torch.dtype):
        super().__init__()
        self._where = segments, positions, dtype

    def __missing__(self, window: int | None) -> Tensor:
        segments, positions, dtype = self._where
        seen = visible(segments, positions, window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        self[window] = mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)
        return self[window]


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
    tree: Mapping[int | None, Tensor] | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within the trees of `tree`.

    Args:
        query: (R, H, L, E); key, value: (R, H / groups, L, E).
        scaling, dropout, sliding_window, softcap: as the layer says.
        tree: the mask (R, 1, L, L) for each window, see `TreeMasks`.

    Returns:
        (R, L, H, E) and no weights.
    """
    if tree is None:
        raise ValueError(
            "the tree attention was called without `tree`: call the model through TokenScorer, or "
            "set another "
            "attention with model.set_attn_implementation('sdpa')"
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError("attention sinks are not part of the tree attention: use separate rows")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    mask = tree[sliding_window].to(query.dtype)
    if softcap is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
        )
    else:
        out = _softcapped(query, key, value, mask, scaling, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


def _softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float,
    dropout: float,
) -> Tensor:
    """softmax(softcap * tanh(scaling q k^T / softcap) + mask) v, which SDPA cannot do (Gemma 2)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = F.dropout(weights.to(query.dtype), dropout)
    return torch.matmul(weights, value)


def register_tree_attention() -> None:
    """Make `TREE_ATTENTION` known to `transformers`; again is harmless.

    No mask function is registered beside it on purpose: `transformers` then builds no mask of its
    own.
    """
    AttentionInterface.register(TREE_ATTENTION, tree_attention)
