"""Attention within trees on a GPU: FlexAttention with a block mask built from segment ids.

The mask of 128 x 128 blocks is made on the device from the first and last tree and node of each
block, without a mask of tokens and without waiting for the device.

Letters: R rows, L tokens of a row, H heads, E head width, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from modern_llm.models.attention.paths import paths

SIDE = 128
"""Side of a block in tokens. Rows are padded to a multiple, so that there are few lengths."""
# Tree id of padding, larger than any other: padding sees only itself.
NO_TREE = 1 << 30
COMPILER_OPTIONS = {"wrap_inductor_compiled_regions": True}
"""Show compiled code to `training_mode.recompute_activations`, which keeps the attention's results:
else it would be computed again in the backward."""
VARIANTS = 64
"""Graphs of the attention in one process, at most."""
KERNEL_OPTIONS: dict[str, bool] = {
    # Rows below 128 tokens would take the kernel for decoding, which has no version for 8 and more
    # query heads per key head, and no backward.
    "FORCE_USE_FLEX_ATTENTION": True,
}
"""Options of the kernels, for every call; `attend` adds IS_DIVISIBLE.

Not set: ROWS_GUARANTEED_SAFE, because a query may see nothing in the first block that it visits,
which would give NaN; PRESCALE_QK, because it rounds; USE_TMA, BACKEND="FLASH" and the sizes of
tiles, because only a measurement on a device justifies them.
"""


def block_mask(segments: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    """Return the block mask of `attention.visible`.

    Blocks with any visible pair of tokens are computed and masked token by token; blocks in which
    all pairs are visible skip the mask.
    """
    tree, node, last = paths(segments)
    tree = torch.where(tree < 0, NO_TREE, tree)

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        there, here = tree[row, key], node[row, query]
        # Out of place: inductor refuses a kernel whose mask function writes to a tensor.
        seen = (there == tree[row, query]) & (there < NO_TREE) & (key <= query)
        seen = seen & (node[row, key] <= here) & (here <= last[row, key])
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen | (query == key)

    some, whole = _blocks(tree, node, last, positions, window)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=SIDE,
        mask_mod=visible,
        seq_lengths=(tree.shape[1], tree.shape[1]),
    )


def _blocks(
    tree: Tensor, node: Tensor, last: Tensor, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Return (R, B, B) [row, query, key] twice: some pair may be visible; all pairs are visible.

    The first is an upper bound, the second a lower one; blocks between are masked by token.
    """
    first_tree, last_tree = _extremes(tree, NO_TREE)
    lowest, highest = _extremes(node, 0)
    nearest, furthest = _extremes(last, 0)
    low, high = _extremes(positions, 0)

    def query(values: Tensor) -> Tensor:
        return values[:, :, None]

    def key(values: Tensor) -> Tensor:
        return values[:, None, :]

    index = torch.arange(lowest.shape[1], device=tree.device)
    before = index[None, :] < index[:, None]
    itself = index[None, :] == index[:, None]
    overlap = (key(last_tree) >= query(first_tree)) & (key(first_tree) <= query(last_tree))
    alone = (first_tree == last_tree) & (last_tree < NO_TREE)
    one_tree = query(alone) & key(alone) & (query(first_tree) == key(first_tree))
    # A token is seen from its own node and from those below it: node to last.
    apart = (key(lowest) > query(highest)) | (key(furthest) < query(lowest))
    above = (key(highest) <= query(lowest)) & (key(nearest) >= query(highest))
    some = itself | (before & overlap & ~(one_tree & apart))
    whole = before & one_tree & above
    # A short last block is never whole: keys beyond the row are not visible.
    if tree.shape[1] % SIDE:
        whole[:, -1] = False
    if window is not None:
        whole &= query(high) - key(low) < window
    return some, whole


def _extremes(values: Tensor, filler: int) -> tuple[Tensor, Tensor]:
    """Return minimum and maximum (R, B) of each block of (R, L)."""
    short = -values.shape[1] % SIDE
    blocks = F.pad(values, (0, short), value=filler).unflatten(1, (-1, SIDE))
    return blocks.amin(-1), blocks.amax(-1)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Turn (R, B, B) booleans into counts (R, 1, B) and indices (R, 1, B, B) of the set blocks."""
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    numbers = blocks.sum(-1)
    return numbers.to(torch.int32)[:, None], indices.to(torch.int32).contiguous()[:, None]


def set_up_compiler() -> None:
    """Let torch's compiler make every variant of the attention, each with its own constants.

    Variants differ in dtype, gradients, window, soft-cap and heads. Beyond torch's limit of 8 it
    would compute whole rows of scores without a fused kernel. A number that is a variable of the
    graph, such as a soft-cap, cannot be part of a score function.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(VARIANTS, settings.recompile_limit)
    settings.specialize_float = True


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    from torch._inductor import config  # slow to import, and a CPU does not need it

    set_up_compiler()
    # Dynamic: one graph for all lengths. Full graph: beyond the limit of variants is an error.
    known = config.get_config_copy()  # some versions of torch lack the option
    options = {name: value for name, value in COMPILER_OPTIONS.items() if name in known}
    return torch.compile(_fused, dynamic=True, fullgraph=True, options=options or None)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    options: dict[str, bool],
) -> Tensor:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return flex_attention(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Return the attention (R, H, L, E) over the visible keys of `mask`.

    Args:
        query: (R, H, L, E); key, value: (R, H / groups, L, E).
    """
    if dropout:
        # FlexAttention has no dropout. Models trained with it are small: a dense mask is enough.
        rows, _, length, _ = query.shape
        seen = create_mask(mask.mask_mod, rows, None, length, length, device=query.device)
        if softcap is not None:
            raise ValueError("attention dropout with a soft-cap: set attention_dropout to 0")
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, seen, dropout, scale=scaling, enable_gqa=grouped
        )
    options = KERNEL_OPTIONS | {"IS_DIVISIBLE": query.shape[2] % SIDE == 0}
    function = _compiled() if query.device.type == "cuda" else _fused
    return function(query, key, value, mask, scaling, softcap, options)
