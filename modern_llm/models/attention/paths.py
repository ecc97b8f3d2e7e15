"""The nodes of a prefix tree that a token's node is above of."""

from __future__ import annotations

import torch
from torch import Tensor


def paths(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tree, node and last node below it of each token, (R, L) each.

    A token sees the tokens before it whose range from node to last contains its own node.

    Args:
        segments: (R, L, 2) integers [tree, branch], where all branches are below branch 0 and none
            is below another; or (R, L, 3), the result itself.
    """
    if segments.shape[-1] == 3:
        tree, node, last = segments.unbind(-1)
        return tree, node, last
    tree, branch = segments.unbind(-1)
    return tree, branch, torch.where(branch == 0, torch.iinfo(branch.dtype).max, branch)
