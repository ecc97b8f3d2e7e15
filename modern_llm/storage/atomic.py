"""Atomic writes of folders and files: write beside the target, flush, digest, rename.

A committed folder holds `MANIFEST.json` with the size and digest of every other file. Readers
trust only the manifest. A digest detects damage, not forgery, so a fast one is used (XXH3, 128
bits): SHA-256 took longer than a disk takes to write the same bytes. With
`Runtime.committed_folder` many processes write into one folder by the same steps: `begin`, `seal`,
`finish`, `abandon`. Tables, which can be built again, need no manifest: `new_folder`.

Everything gets its final name in this module: checkpoints, exports, token tables, shards of stores,
pages and small files. It imports only the errors, the fault points and the marks of progress of
this project, so that every layer may use it.
"""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

from modern_llm.config.errors import StorageError
from modern_llm.distributed.health import heartbeat
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import open_regular
from modern_llm.storage.untrusted import read_json

MANIFEST = "MANIFEST.json"
LARGEST_MANIFEST = 100_000_000
"""Bytes. A manifest has one line per file, and thousands of ranks write two files each."""
VERSION = 2
DIGESTS: dict[int, tuple[str, Callable[[], Any]]] = {
    1: ("sha256", hashlib.sha256),
    2: ("xxh3_128", xxhash.xxh3_128),
}
"""Manifest version -> name and function of its file digest. All of these versions can be read;
`VERSION` is written."""
TEMPORARY = ".tmp-"
"""Prefix of uncommitted names, owned by the creating process."""

_BLOCK = 16 << 20
_noted: dict[Path, dict[str, Any]] = {}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def committed_folder(target: Path, facts: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; on leaving without an error it becomes `target`.

    Args:
        target: replaced if it exists, in one step where the file system can.
        facts: written into the manifest beside the list of files.

    Raises:
        StorageError: a write fails. Nothing is left behind, and the earlier content is unchanged.
    """
    with refusals(target):
        place = begin(target)
        try:
            yield place
            files = noted(place)
            finish(place, target, files | seal(place, done=files), facts or {})
        finally:
            abandon(place)


@contextmanager
def refusals(target: Path) -> Iterator[None]:
    """Convert an OSError in the body to a `StorageError` that names `target`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another place"
        ) from error


def begin(target: Path) -> Path:
    """Create the temporary folder of `target` and return it."""
    place = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    shutil.rmtree(place, ignore_errors=True)
    try:
        with around("folder.make"):
            place.mkdir(parents=True)
    except OSError:
        abandon(place)
        raise
    return place


def note_digest(path: Path, digest: str) -> None:
    """Record files that were flushed and digested while written, so that `seal` skips them."""
    _noted[path] = _entry(path, digest)


def noted(place: Path) -> dict[str, dict[str, Any]]:
    """Remove and return the recorded files of `place`: name -> size and digest."""
    paths = [path for path in list(_noted) if path.is_relative_to(place)]
    return {str(path.relative_to(place)): _noted.pop(path) for path in paths}


def seal(
    place: Path, rank: int = 0, world: int = 1, done: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Flush and digest this rank's share of the files in `place`; name -> size and digest.

    A file is flushed while it is read: neither waits for the other.

    Args:
        done: names that some rank has recorded.
    """
    found = sorted(p for p in place.rglob("*") if p.is_file())
    paths = [p for p in found if str(p.relative_to(place)) not in done][rank::world]
    files = {}
    with ThreadPoolExecutor(max_workers=1) as aside:
        for path in paths:
            flushed = aside.submit(flush_file, path)
            digest = digest_file(path)
            flushed.result()
            files[str(path.relative_to(place))] = _entry(path, digest)
    return files


def _entry(path: Path, digest: str) -> dict[str, Any]:
    return {"size": path.stat().st_size, DIGESTS[VERSION][0]: digest}


def finish(
    place: Path, target: Path, files: dict[str, dict[str, Any]], facts: dict[str, Any]
) -> None:
    """Write the manifest of the sealed files and give the folder its name."""
    _write_manifest(place, files, facts)
    for folder in {path.parent for path in place.rglob("*")} - {place}:
        flush_folder(folder)
    flush_folder(place)
    name_folder(place, target)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `folder` at the end, flushed but without a manifest.

    An older one is replaced, except one that another machine has put there in the meantime: that
    may be in use, and ours is removed. An error leaves nothing, not even parents that are new.

    Raises:
        StorageError: a write fails.
    """
    # With the host's name: jobs on one file system may have the same process id.
    start = f"{folder.name}.tmp-{socket.gethostname()}-"
    temporary = folder.with_name(f"{start}{os.getpid()}")
    with refusals(folder):
        parents = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
        try:
            before = _state(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            for path in folder.parent.glob(f"{glob.escape(start)}*"):
                if _is_dead(path.name.removeprefix(start).removesuffix("-old")):
                    shutil.rmtree(path, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            for path in sorted(temporary.rglob("*")):
                flush_folder(path) if path.is_dir() else flush_file(path)
            flush_folder(temporary)
            if _state(folder) == before:
                name_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)  # ours, or the replaced folder
            with suppress(OSError):  # of a folder that is there now
                for parent in parents:
                    parent.rmdir()


def _state(folder: Path) -> tuple[int, int] | None:
    """Return a value that changes when the folder is replaced or its entries change."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _is_dead(pid: str) -> bool:
    """Return whether no other process of this machine has this id; False if it is no id."""
    if not pid.isdigit() or int(pid) == os.getpid():
        return pid.isdigit()
    try:
        os.kill(int(pid), 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def name_folder(place: Path, target: Path) -> None:
    """Give a flushed folder its name; `place` may then hold the folder that it replaced."""
    with around("commit.rename"):
        if not target.exists():
            place.rename(target)
        elif not _exchange(place, target):
            old = target.with_name(f"{TEMPORARY}old-{target.name}-{os.getpid()}")
            target.rename(old)
            place.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    flush_folder(target.parent)


def abandon(place: Path) -> None:
    """Remove the folder with the temporary name: a failed write, or the replaced folder."""
    noted(place)
    shutil.rmtree(place, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step, so that neither is ever missing. Return False
    where the system or file system does not support it."""
    with suppress(OSError, AttributeError):
        swap = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
        names = os.fsencode(one), os.fsencode(other)
        return swap(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
    return False


def write_file(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its pieces, atomically: a reader sees the old content or the new."""
    with new_file(path) as temporary:
        with around("text.write"), temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; without an error, that file then becomes `path`.

    Raises:
        StorageError: a write fails. The earlier content is unchanged.
    """
    # No process id: on a shared file system, jobs in containers often have the same one.
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex}")
    try:
        with refusals(path):
            yield temporary
            flush_file(temporary)
            name_file(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def name_file(temporary: Path, path: Path) -> None:
    """Give a flushed file its name."""
    with around("file.rename"):
        temporary.replace(path)
    flush_folder(path.parent)


def verified_manifest(folder: Path) -> dict[str, Any]:
    """Return the facts of a committed folder after checking every byte of it.

    Raises:
        StorageError: a file is missing, unknown, of another size or of another digest.
    """
    manifest = _read_manifest(folder)
    listed, key = manifest["files"], DIGESTS[manifest["version"]][0]
    found = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    }
    for name in sorted(found ^ set(listed)):
        word = "missing" if name in listed else "not in the manifest"
        raise StorageError(f"{folder / name}: {word}")
    for name, entry in listed.items():
        path = folder / name
        if (
            path.is_symlink()
            or path.stat().st_size != entry["size"]
            or digest_file(path, manifest["version"]) != entry[key]
        ):
            raise StorageError(f"{path}: not the bytes that were written (size or {key} differs)")
    return manifest["facts"]


def new_digest() -> Any:
    """Return an empty digest of the written kind; call `update`, then `hexdigest`."""
    return DIGESTS[VERSION][1]()


def digest_file(path: Path, version: int = VERSION) -> str:
    """Return the hex digest of a file's bytes, as in manifests of `version`."""
    digest = DIGESTS[version][1]()
    with open_regular(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            heartbeat.tick()
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = read_json(path, LARGEST_MANIFEST, follow=False)
        version = manifest["version"]
        well_formed = (
            version in DIGESTS
            and type(version) is int  # JSON's true is equal to 1
            and isinstance(manifest["facts"], dict)
            and manifest["own"] == _own_digest(manifest)
            and all(_is_entry(*file, DIGESTS[version][0]) for file in manifest["files"].items())
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path}: no readable manifest ({type(error).__name__})") from error
    if not well_formed:
        raise StorageError(
            f"{path}: not a manifest of version {' or '.join(map(str, DIGESTS))}, or changed after "
            "it was written"
        )
    return manifest


def _is_entry(name: str, entry: Any, key: str) -> bool:
    """Return whether a manifest entry names a file inside its folder, with size and digest."""
    path = Path(name)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(inside) and isinstance(entry["size"], int) and isinstance(entry[key], str)


def _write_manifest(place: Path, files: dict[str, Any], facts: dict[str, Any]) -> None:
    manifest = {"version": VERSION, "facts": facts, "files": files}
    manifest["own"] = _own_digest(manifest)
    with around("manifest.write"), (place / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1, sort_keys=True)
    flush_file(place / MANIFEST)


def flush_file(path: Path) -> None:
    """Flush a file's bytes to disk."""
    with open_regular(path) as file, around("file.flush"):
        os.fsync(file.fileno())


def _own_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of the manifest without this field, to detect a changed byte in it."""
    content = {key: value for key, value in manifest.items() if key != "own"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with around("folder.flush"):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the free bytes for `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize
