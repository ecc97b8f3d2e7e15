"""Ideal operations of a model and peak operations of a GPU: the two terms of `mfu`.

Ideal means: each prompt token once, the head on targets only, attention on visible pairs only.
Padding, recomputation and masked-out scores count as time, not as work.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.models.quantized import elements
from modern_llm.models.shapes import attention_widths
from modern_llm.models.training_mode import decoder_layers

# Operations per second of dense bfloat16 matrix products, from the data sheets, by device name
# without the vendor. The longest entry that is a prefix of the name is used.
BF16_PEAKS = {
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100 80GB HBM3": 989e12,
    "H100 SXM": 989e12,
    "H100 SXM5": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "L40": 181e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
# Words that may follow an entry: memory and form factor. Any other word (Ti, Laptop, MIG) means
# another device.
SAME_DEVICE = re.compile(r"\d+GB|HBM\d\w*|SXM\d*|PCIE", re.IGNORECASE)


class IdealFlops:
    """Floating-point operations of a forward, or of forward and backward.

    Args:
        model: a decoder; its frozen parameters count without weight gradients.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config()
        layers = decoder_layers(model)
        used = trained = 0.0
        for name, parameter in layers.named_parameters():
            if parameter.ndim >= 2:
                size = elements(parameter) * _share_of_experts(config, name, parameter)
                used += size
                trained += size if parameter.requires_grad else 0
        head = model.get_output_embeddings()
        rows = head.weight if head is not None else model.get_input_embeddings().weight
        self._token, self._target = used, float(elements(rows))
        self._trained = trained
        self._trained_target = self._target if rows.requires_grad else 0.0
        # Per visible pair: scores and weighted sum, each a multiplication and an addition.
        heads, width = attention_widths(config)
        self._pair = 4.0 * heads * width
        self._layers = _layers_by_window(config, len(layers)) if heads else {}

    def __call__(self, reach: Tensor, targets: int, *, training: bool) -> float:
        """Return the number of operations.

        Args:
            reach: (T,) number of tokens that each real token sees in full attention, itself
                included.
            targets: number of target tokens.
            training: include the backward.
        """
        pairs = sum(
            count * float((reach if window is None else reach.clamp(max=window)).sum())
            for window, count in self._layers.items()
        )
        forward = 2 * (len(reach) * self._token + targets * self._target) + pairs * self._pair
        if not training:
            return forward
        weights = 2 * (len(reach) * self._trained + targets * self._trained_target)
        return 2 * forward + weights + pairs * self._pair


def _layers_by_window(config: object, count: int) -> dict[int | None, int]:
    """Return the number of layers per attention window; layers without attention do not count."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return {window: count}
    attending = [k for k in kinds if "attention" in k and not k.startswith("linear")]
    sliding = sum(kind == "sliding_attention" for kind in attending) if window else 0
    full = len(attending) - sliding
    return {w: n for w, n in ((None, full), (window, sliding)) if n}


def _share_of_experts(config: object, name: str, parameter: Tensor) -> float:
    """Return the share of a parameter that one token uses: below 1 only for experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    if not experts or not used or "expert" not in name or "shared" in name:
        return 1.0
    return used / experts


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the peak operations per second of a device in the run's dtype, and the device's name.

    A GPU is looked up, because a short measurement depends on its current clock. An unknown one
    gives 0, and so does a CPU: no data sheet says what its cores reach together, and a product
    measured beside other work gave shares of 142%.

    Args:
        precision: "no", "bf16" or "fp16".
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return looked_up(name, precision), name


def looked_up(name: str, precision: str) -> float:
    """Return the peak of a GPU by its name; 0 if unknown, and for float32."""
    words = [word for word in re.split(r"[ -]", name) if word not in ("NVIDIA", "GeForce")]
    for length in range(len(words), 0, -1):
        peak = BF16_PEAKS.get(" ".join(words[:length]))
        if peak is not None:
            same = all(SAME_DEVICE.fullmatch(word) for word in words[length:])
            return peak if same and precision != "no" else 0.0
    return 0.0
