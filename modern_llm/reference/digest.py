"""The digest of a reference: a name made of its weights' content, whatever file holds them.

Not the path, the name or the time of a file; the same for one file and for several, for a `.pt`
file and a `transformers` folder. Once computed, it is remembered with the identity of the files,
so that the same weights are not read twice. Called by the reference pass and the verbs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from modern_llm.config.errors import StorageError
from modern_llm.distributed import progress
from modern_llm.distributed.commit import write_file

log = logging.getLogger(__name__)

# Changes with the way in which the digest is made.
VERSION = 1
# A file system counts time in steps: within one, a file may change and keep its time. Files younger
# than this when they were read are read again next time.
SETTLED_S = 2.0


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over name, shape, dtype and bytes of all tensors, in hex; order is free.

    Two threads, because SHA-256 lets go of the interpreter lock and reading does too.
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
            progress.tick()
    digests.sort()
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def remembered_digest(
    files: list[Path], tensors: Callable[[], Iterable[tuple[str, Tensor]]], memory: Path, facts: str
) -> str:
    """Return the digest of the weights in `files`, read only if they are not those seen before.

    Args:
        tensors: gives names and tensors of the files.
        memory: folder where digests are remembered; nothing is where it cannot be written.
        facts: what else the digest depends on, such as the architecture that says what is tied.

    Raises:
        StorageError: the files changed while they were read.
    """
    before = _identities(files)
    place = memory / f"{hashlib.sha256(str(before[0][0]).encode()).hexdigest()[:24]}.json"
    known = {"version": VERSION, "files": before, "facts": facts}
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(place.read_text(encoding="utf-8"))
        if {name: found[name] for name in known} == json.loads(json.dumps(known)):
            return str(found["digest"])
    began = time.perf_counter()
    digest = digest_of(tensors())
    if _identities(files) != before:
        raise StorageError(
            f"{files[0]}: changed while it was read; wait until it is written, then run again"
        )
    size = sum(entry[1] for entry in before) / 1e9
    log.info("reference: digest of %.2f GB in %.1f s", size, time.perf_counter() - began)
    youngest = max(max(entry[2], entry[3]) for entry in before)
    if time.time_ns() - youngest > SETTLED_S * 1e9:
        with suppress(StorageError, OSError):
            memory.mkdir(parents=True, exist_ok=True)
            write_file(place, json.dumps(known | {"digest": digest}))
    return digest


def _identities(files: list[Path]) -> list[tuple[str, int, int, int, int]]:
    """Path, size, times of content and of inode (ns), and inode of each file."""
    result = []
    for path in files:
        try:
            state = os.stat(path)
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
        place = str(path.resolve())
        result.append((place, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino))
    return result
