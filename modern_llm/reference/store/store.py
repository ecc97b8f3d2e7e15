"""Reference log-probs on disk: a folder of immutable shards under the name of weights and recipe.

An entry is named by the digest of its token ids; its value is the sum of log-probs, the number of
target tokens and, where asked for, the log-prob of each. Shards are written beside their place,
flushed and moved there; which there are is what the folder lists, so that any number of jobs may
add to a store at once. Every byte is checked before it is used: a damaged shard is set aside, named
in the log, and its rows are missing until they are scored again. Called by the fill and the verbs.
"""

from __future__ import annotations

import fcntl
import logging
import platform
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modern_llm.config.errors import StorageError
from modern_llm.reference.store.compaction import due_groups, joined_layout, merged
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
from modern_llm.storage.atomic import flush_file, free_bytes, name_file, write_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.lease import PATIENCE, Claims, lock_is_free

log = logging.getLogger(__name__)


class ReferenceStore:
    """The values of one reference under one recipe. Opening reads the index of every shard.

    Args:
        folder: where it is or will be; made when something is first written.
        identity: digest of the weights and recipe that every shard must have.
        patience: see `claims.Claims`.
    """

    def __init__(self, folder: Path, identity: Identity, *, patience: float = PATIENCE):
        self.folder, self.identity = folder, identity
        self.claims = Claims(folder / "claims", patience=patience)
        self.marks = Marks(folder)
        self._shards: dict[str, Shard] = {}
        self._passed_over: set[str] = set()
        self.refresh()

    @classmethod
    def at(cls, root: Path, identity: Identity, *, patience: float = PATIENCE) -> ReferenceStore:
        """Return the store of this identity under `root`, whose folder is named after it."""
        return cls(folder_of(root, identity), identity, patience=patience)

    @classmethod
    def open(cls, folder: Path) -> ReferenceStore:
        """Return the store that stands in `folder`.

        Raises:
            StorageError: there is none.
        """
        identity = read_manifest(folder)
        if identity is None:  # lost or damaged: every shard says the same
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
        """Entries of all shards; one that two jobs scored counts twice until they are joined."""
        return sum(len(shard) for shard in self._shards.values())

    @property
    def shards(self) -> list[Shard]:
        """The intact shards, the largest first: most keys are found there and sought no further."""
        return sorted(self._shards.values(), key=lambda shard: (-len(shard), shard.path.name))

    def refresh(self) -> None:
        """Look which shards there are now; a damaged one is set aside and reported."""
        # One that is gone since it was listed was joined: what it held stands under another name.
        for _ in range(ATTEMPTS):
            if self._look():
                return
        raise restless(self.folder)

    def _look(self) -> bool:
        """List and open the shards; return whether none was taken away meanwhile."""
        names = shard_names(self.folder)
        for name in set(self._shards) - names:
            del self._shards[name]
        steady = True
        for name in sorted(names - set(self._shards) - self._passed_over):
            path = self.folder / name
            try:
                self._shards[name] = Shard(path, self.identity)
            except Damaged as damage:
                self._set_aside(path, damage)
            except OSError as error:
                if is_gone(error):
                    steady = False
                else:
                    self._pass_over(path, error)
        return steady

    def find(self, keys: NDArray[np.bytes_], *, tokens: bool = False) -> Entries:
        """Return the entries among `keys` (n,) S16 that the store holds, in the order of keys.

        Args:
            keys: in any order, any number of times each.
            tokens: find only entries with per-token values, and read these.
        """
        wanted = distinct(keys)
        for _ in range(ATTEMPTS):
            try:
                return self._find(wanted, tokens)
            except _Changed:
                self.refresh()
        raise restless(self.folder)

    def _find(self, wanted: NDArray[np.bytes_], tokens: bool) -> Entries:
        parts = []
        # An answer that two jobs scored stands twice; the shard that is first counts.
        for shard in self.shards:
            if not len(wanted) or (tokens and not shard.ragged):
                continue
            with self._watching(shard):
                at, found = shard.find(wanted, tokens=tokens)
                parts.append(found)
                wanted = np.delete(wanted, at)
        found = concatenate(parts, tokens=tokens)
        return found.take(np.argsort(found.keys, kind="stable"))

    def append(self, entries: Entries) -> None:
        """Write one shard with these entries; it is whole on disk when this returns.

        Raises:
            StorageError: the disk refuses; says how much room is missing where that is why.
        """
        if self._add(entries) is None:
            return
        while groups := due_groups(self.shards):
            with self.claims.holding("joining") as held:
                if not held or not all(self._join(group) for group in groups):
                    break

    def _add(self, entries: Entries) -> str | None:
        """Write a shard and return its name; None where there is nothing to write."""
        if not len(entries):
            return None
        keys, first = np.unique(entries.keys, return_index=True)
        entries = entries.take(first)
        ragged = entries.tokens is not None
        targets = int(entries.counts.sum(dtype=np.int64))
        return self._write(Layout(len(keys), targets, ragged), [entries])

    def join(self) -> None:
        """Join all shards into one (those with per-token values into another); each entry once."""
        with self._joining():
            for ragged in (False, True):
                self._join([shard for shard in self.shards if shard.ragged == ragged])

    @contextmanager
    def _joining(self) -> Iterator[None]:
        """Be the only job that replaces shards."""
        with self.claims.holding("joining") as held:
            if not held:
                raise StorageError(
                    f"{self.folder}: another job is joining its shards; run again when it is done"
                )
            self.refresh()
            yield

    def keep_only(self, keys: NDArray[np.bytes_]) -> int:
        """Forget every entry but those of `keys`; return the number that is kept."""
        with self._joining():
            before = self.shards
            ragged = self.find(keys, tokens=True)
            plain = self.find(np.setdiff1d(keys, ragged.keys))
            written = {self._add(entries) for entries in (ragged, plain)}
            self._remove(before, but=written)
        return len(ragged) + len(plain)

    def copy_from(self, other: ReferenceStore) -> None:
        """Take over the shards of another store of the same identity, checked byte by byte."""
        self.marks.add(other.marks.keys())
        for shard in other.shards:
            try:
                shard.verify()
            except (Damaged, OSError) as damage:
                log.warning("%s: %s; its rows are not taken over", shard.path, damage)
                continue
            if (self.folder / shard.path.name).exists():
                continue
            self._commit(shard.size, lambda place, of=shard: _copy(of.path, place))

    def verify(self) -> tuple[int, list[str]]:
        """Check every byte; set damaged shards aside.

        Returns:
            Number of intact shards, and what is wrong with the others, one line each.
        """
        damaged = [path.name for path in self.folder.glob("damaged-*")]
        problems = [f"{name}: set aside earlier" for name in sorted(damaged)]
        if read_manifest(self.folder) != self.identity:
            problems.append(f"{MANIFEST}: missing or not what was written")
        for shard in self.shards:
            try:
                shard.verify()
            except Damaged as damage:
                problems.append(f"{shard.path.name}: {damage}")
                self._set_aside(shard.path, damage)
            except OSError as error:
                problems.append(f"{shard.path.name}: {error.strerror or error}")
        return len(self._shards), problems

    def make_room(self, rows: int, targets: int, *, tokens: bool) -> None:
        """Refuse now what could not be written later: a read-only place, or too little room.

        Args:
            rows: entries that will be added.
            targets: target tokens of all of them.

        Raises:
            StorageError: names the place, and how much room is missing.
        """
        record = (RAGGED if tokens else PLAIN).itemsize + 5  # the index: 4.1 bytes
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
        """Remove set-aside shards, and what dead jobs left; return the number of files."""
        gone = list(self.folder.glob("damaged-*"))
        gone += [p for p in self.folder.glob(f".tmp-{platform.node()}-*") if lock_is_free(p)]
        for path in gone:
            path.unlink(missing_ok=True)
        return len(gone) + self.claims.clean()

    def _join(self, group: list[Shard]) -> bool:
        """Replace some shards by one; False where one of them is damaged or gone."""
        if len(group) < 2:
            return True
        try:
            name = self._write(joined_layout(group), merged(group))
        except Damaged:
            for shard in group:
                try:
                    shard.verify()
                except Damaged as damage:
                    self._set_aside(shard.path, damage)
            return False
        except FileNotFoundError:
            self.refresh()
            return False
        # The new shard is on disk with all that stands in the old ones.
        self._remove(group, but={name})
        return True

    def _remove(self, shards: list[Shard], *, but: set[str | None]) -> None:
        """Remove shards, except those that were written anew under the same name."""
        for shard in shards:
            if shard.path.name not in but and shard.path.name in self._shards:
                del self._shards[shard.path.name]
                with suppress(OSError):
                    shard.path.unlink()

    def _write(self, layout: Layout, chunks: Iterable[Entries]) -> str:
        return self._commit(
            layout.size, lambda place: write_shard(place, self.identity, layout, chunks)
        )

    def _commit(self, size: int, write: Callable[[Path], str]) -> str:
        """Let `write` make a file, which returns its name, and move it there in one piece."""
        temporary = self.folder / f".tmp-{platform.node()}-{uuid.uuid4().hex}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
            with around("shard.make"), temporary.open("wb") as lock:
                with suppress(OSError):  # tells `clean` that somebody is still writing
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                name = write(temporary)
                # Opened before it gets its name: what cannot be read back is seen by nobody.
                shard = Shard(temporary, self.identity)
                shard.path = self.folder / name
                name_file(temporary, shard.path)
        except OSError as error:
            if is_gone(error) and "shard-" in str(error.filename):
                raise  # one of those that were to be joined
            raise self._refused(error, size) from error
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
            log.warning("%s: not what was written; set aside and written anew", path)
            with suppress(OSError), around("store.aside"):
                path.replace(self.folder / f"damaged-{MANIFEST}")
        write_file(path, manifest_text(self.identity))

    def _refused(self, error: OSError, size: int | None = None) -> StorageError:
        reason = error.strerror or str(error)
        if size is not None:
            missing = size - free_bytes(self.folder)
            if missing > 0:
                reason += f"; {missing / 1e6:.1f} MB are missing"
        return StorageError(
            f"reference store {self.folder}: cannot write ({reason}); free space, or name another "
            "folder with MODERN_LLM_CACHE"
        )

    def _set_aside(self, path: Path, damage: Damaged) -> None:
        self._shards.pop(path.name, None)
        aside = path.with_name(f"damaged-{path.name}")
        try:
            with around("store.aside"):
                path.replace(aside)
            log.warning(
                "%s: %s; set aside as %s, its rows are scored again", path, damage, aside.name
            )
        except OSError as error:
            self._passed_over.add(path.name)
            log.warning("%s: %s; cannot be renamed (%s), passed over", path, damage, error.strerror)

    def _pass_over(self, path: Path, error: OSError) -> None:
        self._shards.pop(path.name, None)
        self._passed_over.add(path.name)
        log.warning("%s: cannot be read (%s); passed over", path, error.strerror or error)

    @contextmanager
    def _watching(self, shard: Shard) -> Iterator[None]:
        """Turn a shard that proves damaged, unreadable or gone into another look at the folder."""
        try:
            yield
        except Damaged as damage:
            self._set_aside(shard.path, damage)
            raise _Changed from damage
        except OSError as error:
            if not is_gone(error):
                self._pass_over(shard.path, error)
            raise _Changed from error


class _Changed(Exception):
    """The set of shards is another than when the lookup began."""


def _copy(source: Path, place: Path) -> str:
    with around("shard.copy"):
        shutil.copyfile(source, place)
    flush_file(place)
    return source.name
