"""Folders and files that are either whole or not there: write beside, flush, digest, rename.

A committed folder holds `MANIFEST.json` with the size and SHA-256 of every other file. Readers
believe
only the manifest. A digest shows damage, not forgery. Called for checkpoints, exports and stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modern_llm.config.errors import StorageError

MANIFEST = "MANIFEST.json"
VERSION = 1


@contextmanager
def committed_folder(target: Path, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on leaving without an error it becomes `target`.

    Args:
        target: replaced if it exists.
        facts: written into the manifest beside the list of files.

    Raises:
        StorageError: the disk refuses; nothing is left behind and what stood there before stands.
    """
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        _write_manifest(temporary, facts or {})
        if target.exists():
            old = target.with_name(f".tmp-old-{target.name}-{os.getpid()}")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(target)
        flush_folder(target.parent)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Write a small text file in one piece: a reader sees the old content or the new."""
    # Not the process's number: on a shared file system, jobs in containers often have the same.
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another place"
        ) from error


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of a committed folder after checking every byte of it.

    Raises:
        StorageError: a file is missing, unknown, of another size or of another digest.
    """
    manifest = _read_manifest(folder)
    listed = manifest["files"]
    standing = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    for name in sorted(standing ^ set(listed)):
        word = "missing" if name in listed else "not in the manifest"
        raise StorageError(f"{folder / name}: {word}")
    for name, entry in listed.items():
        path = folder / name
        if (
            path.is_symlink()
            or path.stat().st_size != entry["size"]
            or digest_file(path) != entry["sha256"]
        ):
            raise StorageError(f"{path}: not the bytes that were written (size or SHA-256 differs)")
    return manifest["facts"]


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        if path.is_symlink():
            raise ValueError("a link")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        well_formed = (
            manifest["version"] == VERSION
            and isinstance(manifest["facts"], dict)
            and manifest["own"] == _own_digest(manifest)
            and all(_is_entry(name, entry) for name, entry in manifest["files"].items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: no readable manifest ({type(error).__name__})") from error
    if not well_formed:
        raise StorageError(
            f"{path}: not a manifest of version {VERSION}, or changed after it was written"
        )
    return manifest


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a line of a manifest names a file inside its folder, with size and digest."""
    path = Path(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(inside) and isinstance(entry["size"], int) and isinstance(entry["sha256"], str)


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = str(path.relative_to(folder))
        files[name] = {"size": path.stat().st_size, "sha256": digest_file(path)}
    manifest = {"version": VERSION, "facts": facts, "files": files}
    manifest["own"] = _own_digest(manifest)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def _own_digest(manifest: dict[str, Any]) -> str:
    """Digest of the manifest without this digest: one changed byte in it must show as well."""
    content = {key: value for key, value in manifest.items() if key != "own"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Put on disk which names a folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
