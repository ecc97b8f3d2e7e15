"""The policy without its LoRA adapters, as a reference without weights of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from modern_llm.config import LoraConfig
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.adapters import adapters_off
from modern_llm.models.load import Checkpoint
from modern_llm.models.scorer import TokenScorer
from modern_llm.reference.locate import digest_of_checkpoint


def base_fingerprint(
    runtime: Runtime, checkpoint: Checkpoint, lora: LoraConfig | None
) -> dict[str, Any]:
    """Return the fingerprint of the adapters' base model, which a resumed run must share."""
    return {} if lora is None else {"base": digest_of_checkpoint(runtime, checkpoint)}


class AdapterFreePolicy(nn.Module):
    """Scorer of the policy without its adapters, in place of a second model."""

    def __init__(self, policy: TokenScorer):
        super().__init__()
        # In a tuple, so that it is not registered: the weights belong to the policy alone.
        self._policy = (policy,)

    def forward(self, *arguments: Any) -> Any:
        """Score with the frozen base."""
        (policy,) = self._policy
        with adapters_off(policy.model):
            return policy(*arguments)
