"""One safetensors file, written, looked at and digested at the same time.

What is digested are the bytes in memory: nothing is read back, and on a second core the digest
costs no time beside writing and flushing. The layout is that of `safetensors.torch.save_file`,
whose own call gives no way in. Called by checkpoints and exports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from modern_llm.config.errors import NotFiniteError
from modern_llm.distributed.commit import flush_file, note_digest
from modern_llm.distributed.faults import around

# In the order in which safetensors puts them: the widest first, so that each stands aligned.
NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32",
    "uint32": "U32", "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16",
    "int16": "I16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write and flush one file, and note its digest for the commit of its folder.

    Args:
        tensors: contiguous, of any device.

    Raises:
        NotFiniteError: a tensor holds a value that is not finite; no checkpoint may hold one.
        OSError: the disk refuses.
    """
    order = sorted(tensors, key=lambda name: (_place(tensors[name]), name))
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as looking:
        looks: list[Future[None]] = []
        with around("tensors.write"), path.open("wb", buffering=0) as file:
            for part in _parts(tensors, order, metadata, looking, looks):
                hashing.submit(digest.update, part)
                at = 0
                while at < len(part):
                    at += file.write(part[at:])
        flush_file(path)
        for look in looks:
            look.result()
        # Behind all that was given to the one thread before.
        found = hashing.submit(digest.hexdigest).result()
    note_digest(path, found)


def _parts(
    tensors: dict[str, Tensor],
    order: list[str],
    metadata: dict[str, str],
    looking: ThreadPoolExecutor,
    looks: list[Future[None]],
) -> Iterator[memoryview]:
    """Yield the bytes of the file; a look at each tensor goes to a thread of its own."""
    yield memoryview(_header(tensors, order, metadata))
    for name in order:
        held = tensors[name].detach().cpu()
        looks.append(looking.submit(_look, name, held))
        yield memoryview(held.reshape(-1).view(torch.uint8).numpy())


def _look(name: str, tensor: Tensor) -> None:
    """Raise `NotFiniteError` if `tensor` holds a value that is not finite."""
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # no sums are made of these
        tensor = tensor.float()
    # A sum is several times faster than a look at each value; where it overflows, each is seen.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise NotFiniteError(
            f"{name}: holds values that are not finite, so no checkpoint is written; go on "
            "from the last one with a lower train.learning_rate"
        )


def _header(tensors: dict[str, Tensor], order: list[str], metadata: dict[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[_name(tensor)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _place(tensor: Tensor) -> int:
    return list(NAMES).index(_name(tensor))
