"""Where stores are, what they are called, and the manifest that says whose values they hold.

Called by the store and the verbs.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from modern_llm.reference.layout import FORMAT, Identity

MANIFEST = "MANIFEST.json"


def cache_root() -> Path:
    """Return the folder of all stores: `MODERN_LLM_CACHE`, or a folder beside the Hub's cache."""
    named = os.environ.get("MODERN_LLM_CACHE")
    if named:
        return Path(named)
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(home).expanduser() / "modern_llm"


def stores_in(root: Path) -> list[Path]:
    """Return the folders of all stores under a root."""
    return sorted(path for path in (root / "references").glob("*-*") if path.is_dir())


def folder_of(root: Path, identity: Identity) -> Path:
    """Return the folder of one store under a root."""
    suffix = hashlib.sha256(f"{FORMAT} {identity.recipe}".encode()).hexdigest()[:12]
    return root / "references" / f"{identity.reference[:20]}-{suffix}"


def manifest_text(identity: Identity) -> str:
    """The manifest's text: what each shard must say of itself. Which there are, the folder says."""
    content = {"format": FORMAT, "reference": identity.reference, "recipe": identity.recipe}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps(content | {"own": own}, indent=1, sort_keys=True) + "\n"


def read_manifest(folder: Path) -> Identity | None:
    """Return what a manifest says, None where it is missing or not byte for byte as written."""
    try:
        text = (folder / MANIFEST).read_bytes()
        content = json.loads(text)
        identity = Identity(content["reference"], content["recipe"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return identity if text == manifest_text(identity).encode() else None


def free_bytes(folder: Path) -> int:
    """Bytes that may be written under `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize
