"""Every byte of a store counts: damage is found where it is read, and no wrong value is given.

All bytes and all lengths, no sample of them. Stores are opened in this process; flushing to disk is
left out, because what is tested is what a reader makes of the bytes.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from modern_llm.config.errors import StorageError
from modern_llm.reference.store.layout import BLOCK, Damaged, Identity
from modern_llm.reference.store.paths import MANIFEST, read_manifest
from modern_llm.reference.store.shard import Shard
from modern_llm.reference.store.store import ReferenceStore
from tests.helpers.fills import IDENTITY, expect_equal, numbered_key, scripted

KINDS = pytest.mark.parametrize("ragged", [False, True], ids=["plain", "per-token"])
OTHERS = {
    "weights": Identity("0dd" * 20, IDENTITY.recipe),
    "recipe": Identity(IDENTITY.reference, '{"compute": "bf16", "scoring": 0}'),
}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Store:
    """A small store of one shard, with values that are known."""

    def __init__(self, folder: Path, ragged: bool, count: int = 9, identity: Identity = IDENTITY):
        self.folder, self.ragged, self.identity = folder, ragged, identity
        keys = np.sort(np.array([numbered_key(i) for i in range(count)], "S16"))
        self.truth = scripted(keys, tokens=ragged)
        ReferenceStore(folder, identity).append(self.truth)
        (self.shard,) = folder.glob("shard-*")
        self.intact = self.shard.read_bytes()
        self.manifest = (folder / MANIFEST).read_bytes()

    def expect_none(self, opened: ReferenceStore) -> None:
        """The one shard is set aside: every row is missing, none is wrong."""
        assert len(opened.find(self.truth.keys, tokens=self.ragged)) == 0
        assert not self.shard.exists()
        aside = self.shard.with_name(f"damaged-{self.shard.name}")
        assert aside.exists()
        aside.unlink()

    def expect_found_again(self, opened: ReferenceStore) -> None:
        """Lost entries are appended again, and then found here and by a store opened later."""
        opened.append(self.truth)
        expect_equal(opened.find(self.truth.keys, tokens=self.ragged), self.truth)
        again = ReferenceStore(self.folder, self.identity)
        expect_equal(again.find(self.truth.keys, tokens=self.ragged), self.truth)
        assert self.shard.read_bytes() == self.intact


def flips(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Every byte inverted, and one random bit of every byte."""
    rng = random.Random(7)
    for at in range(len(content)):
        for mask in (0xFF, 1 << rng.randrange(8)):
            yield at, content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


@KINDS
def test_every_flipped_byte_of_a_shard(place, ragged, caplog):
    store = Store(place, ragged)
    count = 0
    for _, content in flips(store.intact):
        store.shard.write_bytes(content)
        caplog.clear()
        opened = ReferenceStore(place, IDENTITY)
        store.expect_none(opened)
        assert str(store.shard) in caplog.text
        store.expect_found_again(opened)
        count += 1
    assert count == 2 * len(store.intact) > 1000


@KINDS
def test_every_flipped_byte_under_an_open_store(place, ragged, caplog):
    """The header and the index are in memory already: there, the values stay the right ones."""
    caplog.set_level(logging.CRITICAL)
    store = Store(place, ragged)
    unread = Shard(store.shard)._start
    missed = 0
    for _, content in flips(store.intact):
        opened = ReferenceStore(place, IDENTITY)
        with store.shard.open("r+b") as file:
            file.write(content)
        if len(opened.find(store.truth.keys, tokens=ragged)):
            expect_equal(opened.find(store.truth.keys, tokens=ragged), store.truth)
            missed += 1
            store.expect_none(ReferenceStore(place, IDENTITY))
        else:
            store.expect_none(opened)
        store.shard.write_bytes(store.intact)
    index = 8 * -(-len(store.truth) // BLOCK) + 4 * len(store.truth)
    assert missed == 2 * (unread + index)


def test_every_flipped_byte_of_a_block_harms_the_lookups_that_read_it_alone(place, caplog):
    """Values that nobody reads are not checked by a lookup; `verify` names the shard."""
    caplog.set_level(logging.CRITICAL)
    store = Store(place, True)
    opened = Shard(store.shard)
    first = opened._starts["tokens"]
    sums = scripted(store.truth.keys, tokens=False)
    for at, content in flips(store.intact):
        if at < first:
            continue
        store.shard.write_bytes(content)
        opened = ReferenceStore(place, IDENTITY)
        expect_equal(opened.find(store.truth.keys), sums)
        intact, problems = opened.verify()
        assert intact == 0 and len(problems) == 1 and store.shard.name in problems[0]
        store.expect_none(opened)
        store.shard.write_bytes(store.intact)


@KINDS
def test_every_length_that_a_shard_may_be_cut_to(place, ragged, caplog):
    store = Store(place, ragged)
    for length in range(len(store.intact)):
        store.shard.write_bytes(store.intact[:length])
        caplog.clear()
        opened = ReferenceStore(place, IDENTITY)
        store.expect_none(opened)
        assert str(store.shard) in caplog.text
        store.expect_found_again(opened)


@KINDS
def test_every_length_that_a_shard_may_be_cut_to_under_an_open_store(place, ragged, caplog):
    caplog.set_level(logging.CRITICAL)
    store = Store(place, ragged)
    shard = Shard(store.shard)
    needed = shard.size if ragged else shard._starts["checks"]
    for length in range(len(store.intact)):
        opened = ReferenceStore(place, IDENTITY)
        os.truncate(store.shard, length)
        if length < needed:
            store.expect_none(opened)
        else:  # what is cut off is the index, which is in memory
            expect_equal(opened.find(store.truth.keys, tokens=ragged), store.truth)
        store.shard.write_bytes(store.intact)


@KINDS
@pytest.mark.parametrize(
    "tail", [b"\0", b"\n", b"x" * 64, None], ids=["nul", "line", "64", "twice"]
)
def test_trailing_bytes(place, ragged, tail):
    store = Store(place, ragged)
    store.shard.write_bytes(store.intact + (store.intact if tail is None else tail))
    opened = ReferenceStore(place, IDENTITY)
    store.expect_none(opened)
    store.expect_found_again(opened)


@pytest.mark.parametrize("said", ["Infinity", "1e999", "null", "[]", "9" * 5000])
def test_counts_that_are_no_counts(place, said):
    store = Store(place, ragged=False)
    length = int.from_bytes(store.intact[:8], "little")
    header, count = re.subn(
        rb'("rows":)"\d+"', rb"\g<1>" + said.encode(), store.intact[8 : 8 + length]
    )
    assert count == 1
    changed = len(header).to_bytes(8, "little") + header + store.intact[8 + length :]
    store.shard.write_bytes(changed)
    store.expect_none(ReferenceStore(place, IDENTITY))


@KINDS
@pytest.mark.parametrize("other", list(OTHERS))
def test_a_shard_of_another_store(place, ragged, other, caplog):
    store = Store(place / "one", ragged)
    foreign = Store(place / "two", ragged, identity=OTHERS[other])
    assert foreign.shard.name != store.shard.name
    shutil.copy(foreign.shard, store.folder)
    opened = ReferenceStore(store.folder, IDENTITY)
    assert "another reference or recipe" in caplog.text and foreign.shard.name in caplog.text
    assert not (store.folder / foreign.shard.name).exists()
    assert (store.folder / f"damaged-{foreign.shard.name}").exists()
    expect_equal(opened.find(store.truth.keys, tokens=ragged), store.truth)
    # In the place of its own: the same, and the rows are missing.
    shutil.copy(foreign.shard, store.shard)
    opened = ReferenceStore(store.folder, IDENTITY)
    store.expect_none(opened)
    store.expect_found_again(opened)


@KINDS
def test_a_renamed_shard_is_what_it_holds(place, ragged):
    """A name says nothing of the values: they are found under any, and are the right ones."""
    store = Store(place, ragged)
    more = scripted(np.array([numbered_key(i) for i in range(50, 60)], "S16"), tokens=ragged)
    more = more.take(np.argsort(more.keys))
    store.shard.rename(place / f"shard-{'0' * 24}.safetensors")
    opened = ReferenceStore(place, IDENTITY)
    expect_equal(opened.find(store.truth.keys, tokens=ragged), store.truth)
    opened.append(more)
    expect_equal(opened.find(more.keys, tokens=ragged), more)
    # In the place of another, whose rows are then missing. Who has opened that one before sees
    # bytes that are not its own and sets them aside; who opens it now reads them.
    (other,) = [shard.path for shard in opened.shards if "0" * 24 not in shard.path.name]
    (place / f"shard-{'0' * 24}.safetensors").replace(other)
    again = ReferenceStore(place, IDENTITY)
    expect_equal(again.find(store.truth.keys, tokens=ragged), store.truth)
    assert len(again.find(more.keys, tokens=ragged)) == 0
    for part in (store.truth, more):
        assert len(opened.find(part.keys, tokens=ragged)) == 0
        opened.append(part)
        expect_equal(opened.find(part.keys, tokens=ragged), part)


def test_every_flipped_byte_and_every_length_of_the_manifest(place, caplog):
    """Every shard has its content too; a manifest that is not as written is ignored."""
    store = Store(place, False)
    path = place / MANIFEST
    damaged = [content for _, content in flips(store.manifest)]
    damaged += [store.manifest[:length] for length in range(len(store.manifest))]
    damaged += [store.manifest + b"\n", store.manifest * 2]
    more = scripted(np.array([numbered_key(99)], "S16"), tokens=False)
    ReferenceStore(place, IDENTITY).append(more)
    for content in damaged:
        path.write_bytes(content)
        assert read_manifest(place) is None
        opened = ReferenceStore.open(place)
        assert opened.identity == IDENTITY
        expect_equal(opened.find(store.truth.keys), store.truth)
        _, problems = opened.verify()
        assert len(problems) == 1 and MANIFEST in problems[0]
        caplog.clear()
        opened.append(more)
        assert str(path) in caplog.text
        assert path.read_bytes() == store.manifest
        aside = place / f"damaged-{MANIFEST}"
        assert aside.read_bytes() == content
        aside.unlink()
        assert opened.verify() == (2, [])


def test_a_store_without_manifest_and_without_an_intact_shard_is_none(place):
    store = Store(place, False)
    (place / MANIFEST).unlink()
    store.shard.write_bytes(store.intact[:-1])
    with pytest.raises(StorageError, match="no reference store"):
        ReferenceStore.open(place)


def test_a_manifest_of_another_store_opens_no_shard_of_this_one(place, caplog):
    """`open` believes the manifest; then every shard is a stranger, and nothing is found."""
    store = Store(place / "one", False)
    other = Store(place / "two", False, identity=OTHERS["weights"])
    shutil.copy(other.folder / MANIFEST, store.folder)
    opened = ReferenceStore.open(store.folder)
    assert opened.identity == OTHERS["weights"]
    store.expect_none(opened)
    assert "another reference or recipe" in caplog.text


@KINDS
def test_damage_in_one_of_several_shards_costs_its_rows_alone(place, ragged):
    store = Store(place, ragged)
    more = scripted(np.array([numbered_key(i) for i in range(50, 60)], "S16"), tokens=ragged)
    more = more.take(np.argsort(more.keys))
    ReferenceStore(place, IDENTITY).append(more)
    wanted = np.sort(np.concatenate([store.truth.keys, more.keys]))
    opened = ReferenceStore(place, IDENTITY)
    assert len(opened.find(wanted, tokens=ragged)) == len(wanted)
    store.shard.write_bytes(store.intact[:-1] + bytes([store.intact[-1] ^ 1]))
    expect_equal(ReferenceStore(place, IDENTITY).find(wanted, tokens=ragged), more)


def test_a_join_sets_a_damaged_shard_aside_and_keeps_the_others(place, caplog):
    parts = []
    for number in range(3):
        keys = np.sort(np.array([numbered_key(10 * number + i) for i in range(9)], "S16"))
        parts.append(scripted(keys, tokens=True))
        ReferenceStore(place, IDENTITY).append(parts[-1])
    opened = ReferenceStore(place, IDENTITY)
    victim = next(s for s in opened.shards if s.find(parts[1].keys)[0].size)
    content = bytearray(victim.path.read_bytes())
    content[-1] ^= 1
    victim.path.write_bytes(content)
    opened.compact()
    assert victim.path.name in caplog.text
    for number, part in enumerate(parts):
        found = opened.find(part.keys, tokens=True)
        expect_equal(found, part.take(np.arange(9 if number != 1 else 0)))
    opened.compact()
    assert len(opened.shards) == 1
    assert not list(place.glob(".tmp-*"))
    with pytest.raises(Damaged):
        Shard(place / f"damaged-{victim.path.name}").verify()
