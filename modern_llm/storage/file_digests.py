"""Digests of local files, cached by the identity of each file, so that none is read twice.

A file counts as unchanged if its path, size, mtime, ctime and inode number are the same. Used for
data, for the inputs that nodes compare, and for the weights of a reference.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from modern_llm.config.errors import StorageError
from modern_llm.distributed.health import heartbeat
from modern_llm.storage.atomic import write_file
from modern_llm.storage.regular_files import open_regular, read_text

Identity = tuple[str, int, int, int, int]
VERSION = 1
"""Version of the digest; raise it when the way of computing changes."""
# File times are coarse: a file may change within one tick and keep its time. Files younger than
# this when they were read are read again next time.
SETTLED_S = 2.0
_BLOCK = 4 << 20


def cache_root() -> Path:
    """Return the cache folder shared by all runs: `MODERN_LLM_CACHE`, or one beside the Hub's
    cache."""
    named = os.environ.get("MODERN_LLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / "modern_llm"


def identity_of(path: Path) -> Identity:
    """Return path, size, mtime and ctime (ns), and inode number of a file."""
    state = os.stat(path)
    place = str(path.resolve())
    return place, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino


def is_settled(identities: Iterable[Identity]) -> bool:
    """Return whether files are old enough that a later change alters their times."""
    youngest = max(max(identity[2], identity[3]) for identity in identities)
    return time.time_ns() - youngest > SETTLED_S * 1e9


def place_of(memory: Path, about: str) -> Path:
    """Return the file of the cache entry `about` in the folder `memory`."""
    return memory / f"{hashlib.sha256(about.encode()).hexdigest()[:24]}.json"


def file_digests(files: Sequence[Path], memory: Path | None = None) -> list[str]:
    """Return the digest of the bytes of each file; only files not in the cache are read.

    Args:
        memory: folder of the cached digests, by default `digests` in the cache. If it cannot be
            written, nothing is cached.

    Raises:
        OSError: a file cannot be read; names it.
        StorageError: a file changed while it was read.
    """
    memory = cache_root() / "digests" if memory is None else memory
    found: dict[Path, str] = {}
    for folder in sorted({path.parent for path in files}):
        place = place_of(memory, f"files in {folder.resolve()}")
        known = _known(place)
        fresh: dict[str, list[str | int]] = {}
        for path in (path for path in files if path.parent == folder):
            before = identity_of(path)
            entry = known.get(path.name)
            if isinstance(entry, list) and entry[:-1] == list(before):
                found[path] = str(entry[-1])
                continue
            found[path] = _read(path)
            if identity_of(path) != before:
                raise StorageError(
                    f"{path}: changed while it was read; wait until it is written, then run again"
                )
            if is_settled([before]):
                fresh[path.name] = [*before, found[path]]
        if fresh:
            with suppress(StorageError, OSError):
                memory.mkdir(parents=True, exist_ok=True)
                write_file(place, json.dumps({"version": VERSION, "files": known | fresh}))
    return [found[path] for path in files]


def _known(place: Path) -> dict[str, object]:
    """Return the cached digests of a folder's files; empty if the cache is damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        content = json.loads(read_text(place))
        if content["version"] == VERSION:
            return dict(content["files"])
    return {}


def _read(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=20)
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                heartbeat.tick()
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    return digest.hexdigest()
