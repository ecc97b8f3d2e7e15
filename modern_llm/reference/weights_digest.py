"""Digest of a reference's weights, the same for every file format and number of files.

It depends on names, shapes, types and bytes of the tensors, not on path or time of a file. It is
cached with the identity of the files, so that the same weights are not read twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from modern_llm.config.errors import StorageError
from modern_llm.distributed.health import heartbeat
from modern_llm.storage.atomic import write_file
from modern_llm.storage.file_digests import Identity, identity_of, is_settled, place_of
from modern_llm.storage.regular_files import read_text

log = logging.getLogger(__name__)

VERSION = 1
"""Version of the digest; raise it when the way of computing changes."""


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over name, shape, dtype and bytes of all tensors, in any order, in hex.

    Two threads, because SHA-256 and reading release the interpreter lock.
    """

    def one(item: tuple[str, Tensor]) -> tuple[str, str]:
        name, tensor = item
        content = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            content.update(flat.view(torch.uint8).numpy().data)
        return name, content.hexdigest()

    with ThreadPoolExecutor(2) as pool:
        digests = []
        for digest in pool.map(one, tensors):
            digests.append(digest)
            heartbeat.tick()
    digests.sort()
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def remembered_digest(
    files: list[Path],
    tensors: Callable[[], Iterable[tuple[str, Tensor]]],
    memory: Path,
    fingerprint: str,
) -> str:
    """Return the digest of the weights in `files`, which are read only if it is not cached.

    Args:
        tensors: returns names and tensors of the files.
        memory: folder of the cached digests; if it cannot be written, nothing is cached.
        fingerprint: what else the digest depends on, such as the architecture with its ties.

    Raises:
        StorageError: the files changed while they were read.
    """
    before = _identities(files)
    entry = place_of(memory, before[0][0])
    known = {"version": VERSION, "files": before, "facts": fingerprint}
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(read_text(entry))
        if {name: found[name] for name in known} == json.loads(json.dumps(known)):
            return str(found["digest"])
    began = time.perf_counter()
    digest = digest_of(tensors())
    if _identities(files) != before:
        raise StorageError(
            f"{files[0]}: changed while it was read; wait until it is written, then run again"
        )
    size = sum(identity[1] for identity in before) / 1e9
    log.info("reference: digest of %.2f GB in %.1f s", size, time.perf_counter() - began)
    if is_settled(before):
        with suppress(StorageError, OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_file(entry, json.dumps(known | {"digest": digest}))
    return digest


def _identities(files: list[Path]) -> list[Identity]:
    result = []
    for path in files:
        try:
            result.append(identity_of(path))
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    return result
