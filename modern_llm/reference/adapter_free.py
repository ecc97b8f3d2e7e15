"""The policy without its LoRA adapters: a reference that needs no weights of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from modern_llm.config import LoraConfig
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.adapters import adapters_off
from modern_llm.models.load import Checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.locate import digest_of_checkpoint


def base_facts(runtime: Runtime, checkpoint: Checkpoint, lora: LoraConfig | None) -> dict[str, Any]:
    """Return what a checkpoint of adapters must share with the run that goes on: their base."""
    return {} if lora is None else {"base": digest_of_checkpoint(runtime, checkpoint)}


class AdapterFreePolicy(nn.Module):
    """The policy without its adapters, asked in place of a second model."""

    def __init__(self, policy: TokenScorer):
        super().__init__()
        # In a tuple: its weights are the policy's, and no second module's.
        self._policy = (policy,)

    def forward(self, *arguments: Any) -> Any:
        """Ask the frozen base."""
        (policy,) = self._policy
        with adapters_off(policy.model):
            return policy(*arguments)
