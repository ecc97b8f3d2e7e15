"""Reference log-probs on disk: immutable safetensors shards in a folder named by weights and
recipe.

An entry is named by the digest of its token ids; its value is the sum of log-probs in float32 and
the
number of target tokens. Shards are written once, under a temporary name first, and checked when
they
are opened. Called by the fill.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from modern_llm.config.errors import StorageError
from modern_llm.reference.keys import KEY_BYTES

log = logging.getLogger(__name__)

FORMAT = "1"


def cache_root() -> Path:
    """Return the folder of all stores: `MODERN_LLM_CACHE`, or a folder beside the Hub's cache."""
    named = os.environ.get("MODERN_LLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / "modern_llm"


class ReferenceStore:
    """The values of one reference under one recipe.

    Args:
        reference: digest of the weights, hex.
        recipe: what else decides a log-prob, see `keys.scoring_recipe`.
    """

    def __init__(self, root: Path, reference: str, recipe: dict[str, Any]):
        text = json.dumps(recipe, sort_keys=True)
        self.reference, self.recipe = reference, text
        suffix = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = root / "references" / f"{reference[:20]}-{suffix}"
        self._keys = np.zeros(0, dtype=f"S{KEY_BYTES}")
        self._sums = np.zeros(0, dtype=np.float32)
        self._counts = np.zeros(0, dtype=np.int32)
        self.refresh()

    def __len__(self) -> int:
        return len(self._keys)

    def refresh(self) -> None:
        """Read every shard that stands in the folder; a damaged one is set aside and reported."""
        parts = [self._read(path) for path in sorted(self.folder.glob("shard-*.safetensors"))]
        parts = [part for part in parts if part is not None]
        if not parts:
            return
        keys, sums, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        # A response scored twice (by two jobs) stands twice; the first shard by name counts.
        self._keys, first = np.unique(keys, return_index=True)
        self._sums, self._counts = sums[first], counts[first]

    def lookup(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Return (found (n,), sums (n,)) for keys (n,) of dtype S16; a sum is 0 where nothing was
        found."""
        found = np.zeros(len(keys), dtype=bool)
        sums = np.zeros(len(keys), dtype=np.float32)
        if len(self._keys) and len(keys):
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            found = self._keys[at] == keys
            sums[found] = self._sums[at[found]]
        return found, sums

    def append(
        self, keys: NDArray[np.bytes_], sums: NDArray[np.float32], counts: NDArray[np.int32]
    ) -> None:
        """Write one shard with these entries, sorted; it is whole on disk when this returns."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        raw = np.frombuffer(keys[order].tobytes(), dtype=np.uint8).reshape(-1, KEY_BYTES)
        tensors = {"keys": raw, "sums": sums[order], "counts": counts[order]}
        digest = _digest(tensors)
        metadata = {
            "format": FORMAT,
            "reference": self.reference,
            "recipe": self.recipe,
            "rows": str(len(keys)),
            "sha256": digest,
        }
        path = self.folder / f"shard-{digest[:24]}.safetensors"
        temporary = self.folder / f".tmp-{path.name}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise StorageError(
                f"reference store {self.folder}: cannot write ({error}); free space, or name "
                "another folder "
                "with MODERN_LLM_CACHE"
            ) from error

    def _read(self, path: Path) -> tuple[NDArray[Any], ...] | None:
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("keys", "sums", "counts")}
            expected = {"format": FORMAT, "reference": self.reference, "recipe": self.recipe}
            if any(metadata.get(name) != value for name, value in expected.items()):
                raise StorageError("header of another store or format")
            if metadata.get("sha256") != _digest(tensors):
                raise StorageError("not the bytes that were written")
        except (SafetensorError, StorageError, OSError, ValueError) as error:
            aside = path.with_name(f"damaged-{path.name}")
            log.warning(
                "%s: %s; set aside as %s, its rows are scored again", path, error, aside.name
            )
            try:
                path.replace(aside)
            except OSError:
                log.warning("%s cannot be renamed; it is passed over", path)
            return None
        keys = np.frombuffer(np.ascontiguousarray(tensors["keys"]).tobytes(), dtype=f"S{KEY_BYTES}")
        return keys, tensors["sums"], tensors["counts"]


def _digest(tensors: dict[str, NDArray[Any]]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        content.update(f"{name} {tensor.dtype.str} {tensor.shape} ".encode())
        content.update(tensor.data)
    return content.hexdigest()
