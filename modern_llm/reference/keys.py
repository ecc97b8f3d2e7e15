"""What a cached log-prob is named by: the reference's weights, the scoring recipe, the exact token
ids.

No path, no position, no time. Called by the store and the fill.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PretrainedConfig

# Changes whenever the arithmetic of scoring changes: old values then miss by themselves.
SCORING_VERSION = 1
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


def weights_digest(model: nn.Module) -> str:
    """Return a digest of name, shape, dtype and bytes of all weights (tied ones once), in hex.

    Weights are the parameters and the buffers saved with them: some routers keep a bias so.

    The same for a sharded and an unsharded file, for a `.pt` file and a `transformers` folder.
    """

    saved = model.state_dict(keep_vars=True)
    weights = dict(model.named_parameters())
    weights |= {name: buffer for name, buffer in model.named_buffers() if name in saved}

    def one(item: tuple[str, torch.Tensor]) -> tuple[str, str]:
        name, tensor = item
        data = (
            tensor.detach().cpu().contiguous().view(torch.uint8)
            if tensor.ndim
            else tensor.detach().cpu()
        )
        content = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        content.update(data.numpy().data if data.numel() else b"")
        return name, content.hexdigest()

    # SHA-256 lets go of the interpreter lock, so threads hash several tensors at once.
    with ThreadPoolExecutor(4) as pool:
        digests = sorted(pool.map(one, weights.items()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def scoring_recipe(config: PretrainedConfig, compute: str) -> dict[str, Any]:
    """Return what besides weights and ids decides a log-prob: computation dtype, architecture, our
    version.

    Args:
        compute: dtype of the forward, "float32", "bf16" or "fp16".
    """
    fields = {k: v for k, v in config.to_dict().items() if k not in NOT_SCORED}
    architecture = hashlib.sha256(
        json.dumps(fields, sort_keys=True, default=str).encode()
    ).hexdigest()
    return {"scoring": SCORING_VERSION, "compute": compute, "architecture": architecture}


def entry_key(prompt: NDArray[np.int32], response: NDArray[np.int32]) -> bytes:
    """Return the 16-byte name of one (prompt, response): a digest of exactly these ids."""
    content = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=KEY_BYTES)
    content.update(np.ascontiguousarray(prompt, dtype="<i4").data)
    content.update(np.ascontiguousarray(response, dtype="<i4").data)
    return content.digest()
