"""Versions of Python and of the packages that decide what a run computes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "modern-llm", "torch", "transformers", "accelerate", "datasets", "deepspeed", "peft",
    "safetensors", "tokenizers", "triton", "flash-attn", "liger-kernel",
)  # fmt: skip


def installed() -> dict[str, str]:
    """Return name -> version of Python and each installed package of `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
