"""Recognise out-of-memory errors of any device."""

from __future__ import annotations

import torch

# The CPU's allocator and cuBLAS raise a plain RuntimeError.
_MESSAGES = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)
