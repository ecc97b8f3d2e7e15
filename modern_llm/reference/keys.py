"""Names of cached log-probs: the scoring recipe, and the digest of the exact token ids.

No path, position or time is part of a name.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray
from transformers import PretrainedConfig

SCORING_VERSION = 4
"""Raise it when the arithmetic of scoring changes: old values are then no longer found."""
KEY_BYTES = 16

# Fields of a model's configuration that no log-prob depends on.
NOT_SCORED = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def scoring_recipe(config: PretrainedConfig, compute: str) -> str:
    """Return dtype of the forward, architecture and version of the scoring, as JSON.

    Together with the weights and the ids they determine a log-prob.

    Args:
        compute: precision of the forward, as `Runtime.forward_dtype`.
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in NOT_SCORED}
    architecture = hashlib.sha256(
        json.dumps(fields, sort_keys=True, default=str).encode()
    ).hexdigest()
    recipe = {"scoring": SCORING_VERSION, "compute": compute, "architecture": architecture}
    return json.dumps(recipe, sort_keys=True)


def masked_key(
    prompt: NDArray[np.int32], response: NDArray[np.int32], gaps: NDArray[np.int32]
) -> bytes:
    """Return the name of a response of which the ids in `gaps` are not summed up."""
    # Another personalisation of the digest: it is never the name of an unmasked response.
    content = hashlib.blake2b(digest_size=KEY_BYTES, person=b"gaps")
    for part in (prompt, response, gaps):
        content.update(part.size.to_bytes(8, "little"))
        content.update(np.ascontiguousarray(part, dtype="<i4").data)
    return content.digest()


def entry_key(prompt: NDArray[np.int32], response: NDArray[np.int32]) -> bytes:
    """Return the 16-byte name of one (prompt, response), a digest of exactly these ids."""
    return entry_keys(prompt, response)[0]


def entry_keys(prompt: NDArray[np.int32], *responses: NDArray[np.int32]) -> list[bytes]:
    """Return the names of several responses to one prompt."""
    start = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    start.update(np.ascontiguousarray(prompt, dtype="<i4").data)
    names = []
    for response in responses:
        content = start.copy()
        content.update(np.ascontiguousarray(response, dtype="<i4").data)
        names.append(content.digest())
    return names
