"""Feed-forward layers in pieces of tokens, so that long rows never hold their widest activations.

A feed-forward layer treats each token alone. Of a row it is therefore computed piece by piece, and
the backward computes each piece again: the products of its inner width, several times the hidden
one, exist for one piece at a time. Values are those of the whole row; gradients of the weights are
sums over the pieces, in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modern_llm.config.errors import UserError
from modern_llm.models.routers import has_experts
from modern_llm.models.training_mode import decoder_layers

# Largest difference of a trial, relative to its largest value: another number of rows may take
# another kernel.
TOLERANCE = 1e-2


def chunk_feed_forward(
    model: PreTrainedModel, tokens: int, measured: PreTrainedModel | None = None
) -> int:
    """Let the feed-forward layers of `model` compute `tokens` tokens at a time; return their count.

    Args:
        measured: a smaller model with the same layers, where the weights of `model` are not read
            yet.

    Raises:
        UserError: the layers have experts, or none of their modules treats each token alone.
    """
    kind = type(model).__name__
    if has_experts(model):
        raise UserError(
            f"train.mlp_chunk: {kind} has experts, which compute their tokens in groups already: "
            "remove it"
        )
    names = {name for layer in decoder_layers(measured or model) for name in token_wise(layer)}
    modules = [
        module
        for layer in decoder_layers(model)
        for name, module in layer.named_children()
        if name in names
    ]
    if not modules:
        raise UserError(
            f"train.mlp_chunk: no module in the layers of {kind} treats each token alone: remove it"
        )
    for module in modules:
        _split(module, tokens)
    return len(modules)


@torch.no_grad()
def token_wise(layer: nn.Module) -> list[str]:
    """Return the names of a layer's own modules of several products that treat each token alone."""
    return [name for name, module in layer.named_children() if _is_token_wise(module)]


def _is_token_wise(module: nn.Module) -> bool:
    matrices = [p for p in module.parameters() if p.ndim == 2]
    if len(matrices) < 2:
        return False
    # The width of its input is one of a matrix; which one, a trial tells.
    for width in {side for matrix in matrices for side in matrix.shape}:
        draw = torch.Generator().manual_seed(width)
        x = torch.randn(1, 6, width, generator=draw).to(matrices[0])
        try:
            whole, late = module(x), module(x[:, 2:])
        except Exception:  # another width, more arguments, or code of the model's own
            continue
        if not isinstance(whole, Tensor) or whole.shape != x.shape:
            continue
        off = (whole[:, 2:] - late).abs().max()
        return bool(off <= TOLERANCE * whole.abs().max())
    return False


def _split(module: nn.Module, tokens: int) -> None:
    forward = module.forward
    if hasattr(forward, "narrow"):
        # The narrow last layer selects states first: these are split.
        forward.__func__.inner = _in_pieces(forward.__func__.inner, tokens)
        return
    module.forward = MethodType(_in_pieces(forward.__func__, tokens), module)


def _in_pieces(forward: Callable[..., Tensor], tokens: int) -> Callable[..., Tensor]:
    """Return `forward` in pieces of so many tokens."""

    def in_pieces(self: nn.Module, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= tokens:
            return forward(self, x)
        pieces = []
        for piece in rows.split(tokens):
            if torch.is_grad_enabled():
                pieces.append(checkpoint(forward, self, piece[None], use_reentrant=False)[0])
            else:
                pieces.append(forward(self, piece[None])[0])
        return torch.cat(pieces).view(*x.shape[:-1], -1)

    return in_pieces
