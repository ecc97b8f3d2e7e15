"""The load-balancing loss of a model's routers (Switch Transformer, arXiv 2101.03961, eq. 4-6).

It is an option of a run. Without the option it is computed only for a checkpoint that enables it
itself (`output_router_logits`), as plain `transformers` does.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line

log = logging.getLogger(__name__)

FUNCTION = "load_balancing_loss_func"
ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class RouterLoss:
    """Load-balancing loss of a model: (router logits of each layer, real (R, L)) -> () loss."""

    function: Callable[..., Tensor]
    experts: int
    top_k: int
    coefficient: float
    """Weight of the loss in the gradient."""

    def __call__(self, logits: tuple[Tensor, ...], real: Tensor) -> Tensor:
        """Return the loss over the real tokens."""
        return self.function(logits, self.experts, self.top_k, real.long())


def router_loss_of(model: PreTrainedModel, coefficient: float | None) -> RouterLoss | None:
    """Return the routers' loss of a run, None if it has none.

    Args:
        coefficient: option of the run. None follows the checkpoint: its own coefficient if it sets
            `output_router_logits`, no loss otherwise.

    Raises:
        UserError: `coefficient` is set and the model has no such loss.
    """
    asked, config = coefficient is not None, model.config.get_text_config()
    if not asked and getattr(config, "output_router_logits", False):
        coefficient = getattr(config, "router_aux_loss_coef", None)
    if not coefficient:
        return None
    loss, why = _loss(model, float(coefficient))
    if loss is None and asked:
        raise UserError(
            f"train.router_loss_coefficient {coefficient}: {type(model).__name__} {why}; remove "
            "the option"
        )
    if loss is None:
        log.info("%s: no router loss: it %s", type(model).__name__, why)
    else:
        source = "train.router_loss_coefficient" if asked else "the checkpoint enables it"
        log.info("router loss: weight %g (%s), logged as aux_loss", coefficient, source)
    return loss


def has_experts(model: nn.Module) -> bool:
    """Whether the model has experts, which compute their tokens in groups."""
    return any("expert" in name for name, _ in model.named_parameters())


def without_router_loss(model: PreTrainedModel) -> dict[str, bool]:
    """Return arguments for a forward without router loss.

    A checkpoint that enables the loss computes it in every forward, and fails if it is a dense
    model of its family. Most architectures do not accept the argument, so it is set only then.
    """
    enabled = getattr(model.config.get_text_config(), "output_router_logits", False)
    return {"output_router_logits": False} if enabled else {}


@torch.no_grad()
def _loss(model: PreTrainedModel, coefficient: float) -> tuple[RouterLoss | None, str]:
    """Return the loss, tried on a few tokens, or None and the reason why the model has none."""
    config = model.config.get_text_config()
    function = getattr(sys.modules[type(model).__module__], FUNCTION, None)
    if function is None or list(inspect.signature(function).parameters) != ARGUMENTS:
        return None, "defines no load-balancing loss"
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not experts or not config.num_experts_per_tok:
        return None, "is a dense model of its family and has no routers"
    loss = RouterLoss(function, experts, config.num_experts_per_tok, coefficient)
    ids = torch.arange(3, 9, device=model.device)[None]
    try:
        output = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True)
        if not output.router_logits:
            return None, "has no layer with routers"
        loss(output.router_logits, torch.ones_like(ids))
    except Exception as error:  # the model's code may raise anything
        return None, f"does not compute its load-balancing loss ({first_line(error)})"
    return loss, ""
