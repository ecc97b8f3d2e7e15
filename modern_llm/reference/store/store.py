"""Reference log-probs on disk: a folder of immutable shards, named after weights and recipe.

An entry is named by the digest of its token ids. Its value is the sum of log-probs, the number of
target tokens and, optionally, the log-prob of each. Shards are written under a temporary name,
flushed and renamed, and the folder's listing decides which exist, so that any number of jobs may
append to a store at once. Every byte is checked before it is used: a damaged shard is set aside and
named in the log, and its entries are missing until they are scored again.
"""

from __future__ import annotations

import fcntl
import logging
import platform
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import StorageError
from modern_llm.reference.store.compaction import compacted_layout, due_groups, merged
from modern_llm.reference.store.entries import Entries, concatenate, distinct
from modern_llm.reference.store.layout import PLAIN, RAGGED, Damaged, Identity, Layout
from modern_llm.reference.store.nonfinite import Marks
from modern_llm.reference.store.paths import (
    ATTEMPTS,
    MANIFEST,
    folder_of,
    manifest_text,
    read_manifest,
    restless,
    shard_names,
)
from modern_llm.reference.store.shard import Shard, is_gone
from modern_llm.reference.store.shard_writer import write_shard
from modern_llm.storage.atomic import free_bytes, name_file, write_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.lease import PATIENCE, Claims, lock_is_free

log = logging.getLogger(__name__)

COMPACTION = "joining"
"""Claim of the one job that replaces shards. Version 0.1 uses this name too."""


class ReferenceStore:
    """The values of one reference under one recipe. Opening reads the index of every shard.

    Args:
        folder: created by the first write.
        identity: digest of the weights and recipe that every shard must have.
        patience: see `lease.Claims`.
    """

    def __init__(self, folder: Path, identity: Identity, *, patience: float = PATIENCE):
        self.folder, self.identity = folder, identity
        self.claims = Claims(folder / "claims", patience=patience)
        self.marks = Marks(folder)
        self._shards: dict[str, Shard] = {}
        self._skipped: set[str] = set()
        self.refresh()

    @classmethod
    def at(cls, root: Path, identity: Identity, *, patience: float = PATIENCE) -> ReferenceStore:
        """Return the store of this identity under `root`, whose folder is named after it."""
        return cls(folder_of(root, identity), identity, patience=patience)

    @classmethod
    def open(cls, folder: Path) -> ReferenceStore:
        """Return the existing store in `folder`.

        Raises:
            StorageError: there is none.
        """
        identity = read_manifest(folder)
        if identity is None:  # lost or damaged: every shard has it too
            for path in sorted(folder.glob("shard-*.safetensors")):
                with suppress(Damaged, OSError):
                    identity = Shard(path).identity
                    break
        if identity is None:
            raise StorageError(
                f"{folder}: no reference store (neither a {MANIFEST} nor an intact shard); name "
                "the folder of one"
            )
        return cls(folder, identity)

    def __len__(self) -> int:
        """Entries of all shards; one that two jobs scored counts twice until a compaction."""
        return sum(len(shard) for shard in self._shards.values())

    @property
    def shards(self) -> list[Shard]:
        """The intact shards, the largest first: a key is searched until it is found."""
        return sorted(self._shards.values(), key=lambda shard: (-len(shard), shard.path.name))

    def refresh(self) -> None:
        """List the folder again and open new shards; a damaged one is set aside."""
        for _ in range(ATTEMPTS):
            names = shard_names(self.folder)
            self._shards = {name: shard for name, shard in self._shards.items() if name in names}
            vanished = False
            for name in sorted(names - set(self._shards) - self._skipped):
                try:
                    self._shards[name] = Shard(self.folder / name, self.identity)
                except (Damaged, OSError) as error:
                    vanished |= self._drop(self.folder / name, error)
            # A shard that vanished after it was listed was compacted: list again.
            if not vanished:
                return
        raise restless(self.folder)

    def find(self, keys: NDArray[np.bytes_], *, tokens: bool = False) -> Entries:
        """Return the entries among `keys` (n,) S16 that the store holds, in the order of keys.

        Args:
            keys: in any order, any number of times each.
            tokens: find only entries with per-token values, and read these.
        """
        wanted = distinct(keys)
        for _ in range(ATTEMPTS):
            parts, missing = [], wanted
            # An answer that two jobs scored is in two shards; the first one counts.
            for shard in self.shards:
                if not len(missing) or (tokens and not shard.layout.ragged):
                    continue
                try:
                    at, found = shard.find(missing, tokens=tokens)
                except (Damaged, OSError) as error:
                    self._drop(shard.path, error)
                    break
                parts.append(found)
                missing = np.delete(missing, at)
            else:
                found = concatenate(parts, tokens=tokens)
                return found.take(np.argsort(found.keys, kind="stable"))
            self.refresh()
        raise restless(self.folder)

    def known(self, keys: NDArray[np.bytes_], *, tokens: bool = False) -> NDArray[np.bool_]:
        """Return which of `keys` (n,) need no scoring: they have an entry or a not-finite mark.

        Args:
            tokens: an entry without per-token values does not count.
        """
        found = self.find(keys, tokens=tokens).keys
        return np.isin(keys, found) | np.isin(keys, self.marks.keys())

    def append(self, entries: Entries) -> None:
        """Write one shard with these entries, flushed to disk, and compact the shards when due.

        Raises:
            StorageError: a write fails; names the missing space if that is the reason.
        """
        if self._add(entries) is None:
            return
        while groups := due_groups(self.shards):
            with self.claims.holding(COMPACTION) as held:
                if not held or not all(self._compact(group) for group in groups):
                    break

    def _add(self, entries: Entries) -> str | None:
        """Write a shard and return its name; None if there are no entries."""
        if not len(entries):
            return None
        _, first = np.unique(entries.keys, return_index=True)
        entries = entries.take(first)
        targets = int(entries.counts.sum(dtype=np.int64))
        return self._write(Layout(len(entries), targets, entries.tokens is not None), [entries])

    def compact(self) -> None:
        """Replace all shards by one, those with per-token values by another; each entry once."""
        with self._compacting():
            for ragged in (False, True):
                self._compact([shard for shard in self.shards if shard.layout.ragged == ragged])

    def keep_only(self, keys: NDArray[np.bytes_]) -> int:
        """Remove every entry except those of `keys`; return the number that is kept."""
        with self._compacting():
            before = self.shards
            ragged = self.find(keys, tokens=True)
            plain = self.find(np.setdiff1d(keys, ragged.keys))
            written = {self._add(entries) for entries in (ragged, plain)}
            self._remove(before, keep=written)
        return len(ragged) + len(plain)

    def copy_from(self, other: ReferenceStore) -> None:
        """Copy the intact shards of another store of the same identity, every byte checked."""
        self.marks.add(other.marks.keys())
        for shard in other.shards:
            try:
                shard.verify()
                if not (self.folder / shard.path.name).exists():
                    self._write(shard.layout, merged([shard]))
            except (Damaged, OSError) as error:
                log.warning("%s: %s; its entries are not copied", shard.path, _reason(error))

    def verify(self) -> tuple[int, list[str]]:
        """Check every byte; set damaged shards aside.

        Returns:
            Number of intact shards, and one line for each problem.
        """
        damaged = [path.name for path in self.folder.glob("damaged-*")]
        problems = [f"{name}: set aside earlier" for name in sorted(damaged)]
        if read_manifest(self.folder) != self.identity:
            problems.append(f"{MANIFEST}: missing or not what was written")
        problems += self._check(self.shards)
        return len(self._shards), problems

    def check_space(self, rows: int, targets: int, *, tokens: bool) -> None:
        """Check before the scoring that the store can be written and has enough space.

        Args:
            rows: entries to be added.
            targets: target tokens of all of them.

        Raises:
            StorageError: names the folder, and how much space is missing.
        """
        record = (RAGGED if tokens else PLAIN).itemsize + 5  # the index: 4.25 bytes
        need = int(1.1 * (rows * record + (4 * targets if tokens else 0))) + (64 << 10)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
            probe = self.folder / f".tmp-probe-{uuid.uuid4().hex}"
            with around("store.probe"):
                probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise self._refused(error) from error
        free = free_bytes(self.folder)
        if free < need:
            raise StorageError(
                f"reference store {self.folder}: needs {need / 1e6:.1f} MB, {free / 1e6:.1f} MB "
                f"are free: {(need - free) / 1e6:.1f} MB are missing; free them, or name another "
                "folder with MODERN_LLM_CACHE"
            )

    def clean(self) -> int:
        """Remove set-aside shards and leftovers of dead jobs; return the number of files."""
        found = list(self.folder.glob("damaged-*"))
        found += [p for p in self.folder.glob(f".tmp-{platform.node()}-*") if lock_is_free(p)]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found) + self.claims.clean()

    @contextmanager
    def _compacting(self) -> Iterator[None]:
        """Be the only job that replaces shards."""
        with self.claims.holding(COMPACTION) as held:
            if not held:
                raise StorageError(
                    f"{self.folder}: another job is compacting its shards; run again when it is "
                    "done"
                )
            self.refresh()
            yield

    def _compact(self, group: list[Shard]) -> bool:
        """Replace some shards by one; return False if one of them is damaged or vanished."""
        if len(group) < 2:
            return True
        try:
            name = self._write(compacted_layout(group), merged(group))
        except Damaged:
            self._check(group)
            return False
        except FileNotFoundError:
            self.refresh()
            return False
        # The new shard is on disk with all entries of the old ones.
        self._remove(group, keep={name})
        return True

    def _check(self, shards: list[Shard]) -> list[str]:
        """Check every byte of some shards, drop those with a problem and return the problems."""
        problems = []
        for shard in shards:
            try:
                shard.verify()
            except (Damaged, OSError) as error:
                problems.append(f"{shard.path.name}: {_reason(error)}")
                self._drop(shard.path, error)
        return problems

    def _remove(self, shards: list[Shard], *, keep: set[str | None]) -> None:
        """Remove shards, except those that were written again under the same name."""
        for shard in shards:
            if shard.path.name not in keep and shard.path.name in self._shards:
                del self._shards[shard.path.name]
                with suppress(OSError):
                    shard.path.unlink()

    def _write(self, layout: Layout, chunks: Iterable[Entries]) -> str:
        """Write one shard and open it; return its name."""
        temporary = self.folder / f".tmp-{platform.node()}-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
            with around("shard.make"), temporary.open("wb") as lock:
                with suppress(OSError):  # shows `clean` that the writer is alive
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name = write_shard(temporary, self.identity, layout, chunks)
                # Opened under the temporary name: a shard that cannot be read back gets no name.
                shard = Shard(temporary, self.identity)
                shard.path = self.folder / name
                name_file(temporary, shard.path)
        except OSError as error:
            if is_gone(error) and "shard-" in str(error.filename):
                raise  # a source of the compaction
            raise self._refused(error, layout.size) from error
        finally:
            with suppress(OSError):
                temporary.unlink()
        self._shards[name] = shard
        return name

    def _write_manifest(self) -> None:
        path = self.folder / MANIFEST
        if path.exists():
            if read_manifest(self.folder) == self.identity:
                return
            log.warning("%s: not what was written; set aside and written again", path)
            with suppress(OSError), around("store.aside"):
                path.replace(self.folder / f"damaged-{MANIFEST}")
        write_file(path, manifest_text(self.identity))

    def _refused(self, error: OSError, size: int = 0) -> StorageError:
        """Return the error of a failed write of `size` bytes."""
        reason = _reason(error)
        if size and (missing := size - free_bytes(self.folder)) > 0:
            reason += f"; {missing / 1e6:.1f} MB are missing"
        return StorageError(
            f"reference store {self.folder}: cannot write ({reason}); free space, or name another "
            "folder with MODERN_LLM_CACHE"
        )

    def _drop(self, path: Path, error: Damaged | OSError) -> bool:
        """Stop using a shard, and rename a damaged one; return whether it had vanished."""
        self._shards.pop(path.name, None)
        if isinstance(error, OSError) and is_gone(error):
            return True
        reason = f"cannot be read ({_reason(error)})"
        if isinstance(error, Damaged):
            aside = path.with_name(f"damaged-{path.name}")
            try:
                with around("store.aside"):
                    path.replace(aside)
                log.warning(
                    "%s: %s; set aside as %s, its entries are scored again", path, error, aside.name
                )
                return False
            except OSError as refusal:
                reason = f"{error}; cannot be renamed ({_reason(refusal)})"
        self._skipped.add(path.name)
        log.warning("%s: %s; skipped", path, reason)
        return False


def _reason(error: Damaged | OSError) -> str:
    return getattr(error, "strerror", None) or str(error)
