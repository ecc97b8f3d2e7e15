"""Writer of one safetensors file that checks and digests the data while it is flushed.

A flush waits for the disk and uses no CPU. It begins with the first group of tensors, so that the
disk does not wait for the last. The bytes in memory are digested: nothing is read back. The layout
is that of `safetensors.torch.save_file`, which has no hook for this.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from modern_llm.config.errors import NotFiniteError
from modern_llm.distributed.health import heartbeat
from modern_llm.storage.atomic import flush_file, new_digest, note_digest
from modern_llm.storage.fault_points import around

# In the order of safetensors: the widest first, so that each tensor is aligned.
NAMES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32",
    "uint32": "U32", "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16",
    "int16": "I16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
GROUP = 2**26
"""Bytes written per flush."""


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write and flush one file, and record its digest for the commit of its folder.

    Args:
        tensors: contiguous, on any device; about `GROUP` bytes are copied to the host at a time.

    Raises:
        NotFiniteError: a tensor holds a value that is not finite; no checkpoint may hold one.
        OSError: a write fails.
    """
    order = sorted(tensors, key=lambda name: (_place(tensors[name]), name))
    digest = new_digest()
    waiting = [memoryview(_header(tensors, order, metadata))]
    flushes: list[Future[None]] = []
    with ThreadPoolExecutor(1) as flushing:
        for at, group in enumerate(_groups(tensors, order) or [[]]):
            held = {name: tensors[name].detach().cpu() for name in group}
            waiting += [memoryview(t.reshape(-1).view(torch.uint8).numpy()) for t in held.values()]
            with around("tensors.write"), path.open("ab" if at else "wb", buffering=0) as file:
                for part in waiting:
                    done = 0
                    while done < len(part):
                        done += file.write(part[done:])
            heartbeat.tick()
            flushes.append(flushing.submit(flush_file, path))
            for part in waiting:
                digest.update(part)
                heartbeat.tick()
            for name, tensor in held.items():
                _look(name, tensor)
            waiting = []
        for flush in flushes:  # all of them: the system reports a lost write only once
            flush.result()
            heartbeat.tick()
    note_digest(path, digest.hexdigest())


def _groups(tensors: dict[str, Tensor], order: list[str]) -> list[list[str]]:
    """Split the names of `order` into groups of about `GROUP` bytes, in order."""
    groups, room = [], 0
    for name in order:
        if room <= 0:
            groups.append([])
            room = GROUP
        groups[-1].append(name)
        room -= tensors[name].numel() * tensors[name].element_size()
    return groups


def _look(name: str, tensor: Tensor) -> None:
    """Raise `NotFiniteError` if `tensor` holds a value that is not finite."""
    if not tensor.is_floating_point():
        return
    if tensor.element_size() == 1:  # these have no sum
        tensor = tensor.float()
    # A sum is several times faster than checking each value, which is done only on overflow.
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise NotFiniteError(
            f"{name}: holds values that are not finite, so no checkpoint is written; resume "
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
