"""Marks of answers whose log-prob is not finite under a store's weights; no value is stored.

Each addition is a small file named by its content, so that jobs that fill one store do not wait for
each other. The answers of a file that cannot be read are scored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.reference.keys import KEY_BYTES
from modern_llm.storage.atomic import write_file
from modern_llm.storage.regular_files import read_text

log = logging.getLogger(__name__)

PREFIX = "not-finite-"


class Marks:
    """The marks in the folder of one store."""

    def __init__(self, folder: Path):
        self._folder = folder

    def keys(self) -> NDArray[np.bytes_]:
        """Return the marked keys (n,) S16, sorted, each once."""
        found: set[bytes] = set()
        for path in sorted(self._folder.glob(f"{PREFIX}*.json")):
            try:
                names = [bytes.fromhex(name) for name in json.loads(read_text(path))]
                if any(len(name) != KEY_BYTES for name in names):
                    raise ValueError("another length")
            except (OSError, ValueError, TypeError, RecursionError) as error:
                log.warning("%s: cannot be read (%s); skipped", path, type(error).__name__)
                continue
            found.update(names)
        return np.frombuffer(b"".join(sorted(found)), f"S{KEY_BYTES}")

    def add(self, keys: NDArray[np.bytes_]) -> None:
        """Mark keys (n,) S16.

        Raises:
            StorageError: a write fails.
        """
        if not len(keys):
            return
        every = np.unique(keys).astype(f"S{KEY_BYTES}").tobytes()
        names = [every[at : at + KEY_BYTES].hex() for at in range(0, len(every), KEY_BYTES)]
        text = json.dumps(names) + "\n"
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        write_file(self._folder / f"{PREFIX}{name}.json", text)
