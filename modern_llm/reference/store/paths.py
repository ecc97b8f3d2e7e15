"""Folders of stores, their names, and the manifest with the identity of the values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from modern_llm.config.errors import StorageError
from modern_llm.reference.store.layout import FORMAT, Identity
from modern_llm.storage.regular_files import read_bytes

MANIFEST = "MANIFEST.json"
ATTEMPTS = 20
"""Most listings of a folder that other jobs change meanwhile."""


def stores_in(root: Path) -> list[Path]:
    """Return the folders of all stores under a root."""
    return sorted(path for path in (root / "references").glob("*-*") if path.is_dir())


def folder_of(root: Path, identity: Identity) -> Path:
    """Return the folder of one store under a root."""
    suffix = hashlib.sha256(f"{FORMAT} {identity.recipe}".encode()).hexdigest()[:12]
    return root / "references" / f"{identity.reference[:20]}-{suffix}"


def manifest_text(identity: Identity) -> str:
    """Return the manifest: the identity that each shard must have, and no list of them."""
    content = {"format": FORMAT, "reference": identity.reference, "recipe": identity.recipe}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"own": own}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Identity | None:
    """Return the identity in a manifest; None if it is missing or not byte for byte as written."""
    try:
        text = read_bytes(folder / MANIFEST)
        content = json.loads(text)
        identity = Identity(content["reference"], content["recipe"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return identity if text == manifest_text(identity).encode() else None


def shard_names(folder: Path) -> set[str]:
    """Return the names of the shards in a folder, on which two listings in a row agree.

    One listing is not enough: some file systems (tmpfs, NFS) do not list a file that is newer than
    the opening of the folder, so a compaction in that moment hides the old shards and the new one.

    Raises:
        StorageError: it cannot be read, or changes with every listing.
    """
    last: set[str] | None = None
    for _ in range(ATTEMPTS):
        try:
            names = {path.name for path in folder.glob("shard-*.safetensors")}
        except OSError as error:
            raise StorageError(f"{folder}: cannot be read ({error.strerror})") from error
        if names == last:
            return names
        last = names
    raise restless(folder)


def restless(folder: Path) -> StorageError:
    """Return the error of a reader that other jobs leave no time to read."""
    return StorageError(
        f"{folder}: its shards change faster than they can be read; run again when fewer jobs use "
        "it"
    )
