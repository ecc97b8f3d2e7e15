"""A shard returns what was written and nothing else, for all keys and lengths."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from modern_llm.reference.store import shard as module
from modern_llm.reference.store.entries import Entries, concatenate, distinct
from modern_llm.reference.store.layout import BLOCK, PLAIN, RAGGED, Damaged, Identity, Layout
from modern_llm.reference.store.shard import Shard
from modern_llm.reference.store.shard_writer import write_shard
from tests.helpers.fills import expect_equal, numbered_key, scripted

IDENTITY = Identity("feed" * 16, '{"compute": "float32"}')
KINDS = pytest.mark.parametrize("ragged", [False, True], ids=["plain", "per-token"])

# Few first halves, so that many keys share one; NUL bytes at the end, which numpy's strings hide.
edges = [b"\0" * 8, b"\0" * 7 + b"\1", b"m" * 8, b"\x80" + b"\0" * 7, b"\xff" * 8]
halves = st.sampled_from(edges)
any_key = st.one_of(
    st.builds(bytes.__add__, halves, st.binary(min_size=8, max_size=8)),
    st.builds(bytes.__add__, halves, halves),
    st.binary(min_size=16, max_size=16),
)


def keys_of(names: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(names), "S16") if names else np.zeros(0, "S16")


def raw(keys: np.ndarray) -> list[bytes]:
    """The names in full; taking one out of an S16 array drops NUL bytes at its end."""
    content = np.ascontiguousarray(keys).tobytes()
    return [content[at : at + 16] for at in range(0, len(content), 16)]


def write(place: Path, entries: Entries, *, chunks: int = 1, ragged: bool | None = None) -> Shard:
    """Write entries that are sorted, in several chunks."""
    kept = entries.tokens is not None if ragged is None else ragged
    layout = Layout(len(entries), int(entries.counts.sum()), kept)
    parts = [entries.take(part) for part in np.array_split(np.arange(len(entries)), chunks)]
    temporary = place / "new"
    path = place / write_shard(temporary, IDENTITY, layout, parts)
    temporary.replace(path)
    return Shard(path, IDENTITY)


def as_dict(entries: Entries) -> dict[bytes, tuple]:
    tokens = entries.tokens
    ends = np.cumsum(entries.counts)
    result = {}
    for at, name in enumerate(raw(entries.keys)):
        start, end = ends[at] - entries.counts[at], ends[at]
        run = None if tokens is None else tokens[start:end].tobytes()
        result[name] = (entries.sums[at].tobytes(), int(entries.counts[at]), run)
    return result


def numbered(*numbers: int, tokens: bool = True) -> Entries:
    return scripted(np.sort(keys_of([numbered_key(n) for n in numbers])), tokens=tokens)


@given(
    st.sets(any_key, max_size=200), st.lists(any_key, max_size=30), st.booleans(), st.integers(1, 4)
)
@settings(deadline=None)
def test_find_gives_what_a_dictionary_gives(new_place, names, strangers, ragged, chunks):
    names = sorted(names)
    entries = scripted(keys_of(names), tokens=ragged)
    model = as_dict(entries)
    shard = write(new_place(), entries, chunks=chunks)
    assert (len(shard), shard.layout.targets, shard.layout.ragged) == (
        len(names), int(entries.counts.sum()), ragged,
    )  # fmt: skip
    assert shard.size == shard.path.stat().st_size
    wanted = sorted({*names[::2], *strangers})
    at, found = shard.find(keys_of(wanted), tokens=ragged)
    assert [wanted[i] for i in at] == [name for name in wanted if name in model]
    assert as_dict(found) == {name: model[name] for name in wanted if name in model}
    assert shard.prefixes.tolist() == [int.from_bytes(name[:4], "big") for name in names]
    shard.verify()


@given(st.sets(any_key, min_size=1, max_size=200), st.data(), st.booleans())
@settings(deadline=None)
def test_rows_are_those_of_the_sorted_list(new_place, names, data, ragged):
    entries = scripted(keys_of(sorted(names)), tokens=ragged)
    shard = write(new_place(), entries)
    start = data.draw(st.integers(0, len(names)))
    stop = data.draw(st.integers(0, len(names)))
    found = shard.rows(start, stop, tokens=ragged)
    expect_equal(found, entries.take(np.arange(start, max(start, stop))))


@KINDS
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 5 * BLOCK + 3])
@pytest.mark.parametrize("chunks", [1, 3])
def test_sizes_around_a_block(place, count, ragged, chunks):
    entries = numbered(*range(count), tokens=ragged)
    shard = write(place, entries, chunks=chunks)
    at, found = shard.find(entries.keys, tokens=ragged)
    assert at.tolist() == list(range(count))
    expect_equal(found, entries)
    expect_equal(shard.rows(0, count, tokens=ragged), entries)
    at, found = shard.find(numbered(*range(count, count + 50)).keys, tokens=ragged)
    assert len(at) == len(found) == 0
    at, found = shard.find(keys_of([]), tokens=ragged)
    assert len(at) == len(found) == 0
    shard.verify()


@KINDS
def test_equal_first_halves_over_several_blocks(place, ragged):
    """The index knows beginnings alone: these say nothing about the block of such a key."""
    rest = [number.to_bytes(8, "big") for number in range(0, 5 * BLOCK * 2, 2)]
    names = [b"a" * 8 + b"\0" * 8, *(b"mmmmmmmm" + end for end in rest), b"z" * 16]
    names = sorted({*names, *(b"a" * 8 + end for end in rest[:7])})
    entries = scripted(keys_of(names), tokens=ragged)
    shard = write(place, entries)
    for chosen in (names, names[::3], names[70:71], [names[BLOCK]], [names[-1]]):
        at, found = shard.find(keys_of(chosen), tokens=ragged)
        assert at.tolist() == list(range(len(chosen)))
        assert as_dict(found) == {name: as_dict(entries)[name] for name in chosen}
    absent = sorted(b"mmmmmmmm" + number.to_bytes(8, "big") for number in range(1, 700, 2))
    at, _ = shard.find(keys_of(absent), tokens=ragged)
    assert len(at) == 0


def test_lookups_of_more_rows_than_are_read_at_once(place, monkeypatch):
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 2 * BLOCK)
    rest = [number.to_bytes(8, "big") for number in range(3 * BLOCK)]
    names = sorted([*raw(numbered(*range(6 * BLOCK)).keys), *(b"m" * 8 + end for end in rest)])
    entries = scripted(keys_of(names), tokens=True)
    shard = write(place, entries)
    for step in (1, 5, 63, 200):
        at, found = shard.find(entries.keys[::step], tokens=True)
        assert len(at) == len(entries.keys[::step])
        expect_equal(found, entries.take(np.arange(0, len(entries), step)))


@KINDS
def test_answers_without_tokens_and_very_long_ones(place, ragged):
    counts = np.array([0, 0, 5000, 0, 1, 0, 0, 70_000, 0] * 20, np.int32)
    keys = numbered(*range(len(counts))).keys
    tokens = -np.arange(counts.sum(), dtype=np.float32) / 7 if ragged else None
    entries = Entries(keys, np.arange(len(counts), dtype=np.float32), counts, tokens)
    shard = write(place, entries, chunks=4)
    for chosen in (np.arange(180), np.array([0, 1, 3]), np.array([7]), np.array([0, 7, 8, 179])):
        _, found = shard.find(keys[chosen], tokens=ragged)
        expect_equal(found, entries.take(chosen))
    for row in (0, 2, 7, 8, 179):
        expect_equal(shard.rows(row, row + 1, tokens=ragged), entries.take(np.array([row])))


def test_every_answer_without_tokens(place):
    """Like answers of an end token alone that has nothing before it."""
    keys = numbered(*range(70)).keys
    nothing = np.zeros(70, np.float32), np.zeros(70, np.int32), np.zeros(0, np.float32)
    shard = write(place, Entries(keys, *nothing))
    shard.verify()
    expect_equal(shard.find(keys, tokens=True)[1], Entries(keys, *nothing))


def test_values_keep_every_bit(place):
    """Infinities too: what may be written is judged by the fill, what is written comes back."""
    bits = np.array([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC01234, 0x7F7FFFFF], "<u4")
    values = np.resize(bits, 130).view("<f4")
    counts = np.full(130, 1, np.int32)
    counts[3] = 0
    counts[4] = 2
    entries = Entries(numbered(*range(130)).keys, values, counts, values)
    expect_equal(write(place, entries).find(entries.keys, tokens=True)[1], entries)


@KINDS
def test_the_readers_of_safetensors_open_it(place, ragged):
    """The header, the columns and the tokens are where the format says, for anybody's tools."""
    entries = numbered(*range(150), tokens=ragged)
    shard = write(place, entries)
    tensors = load_file(shard.path)
    records = tensors["entries"].reshape(-1).view(RAGGED if ragged else PLAIN)
    assert records["key"].tobytes() == entries.keys.tobytes()
    assert records["sum"].tobytes() == entries.sums.tobytes()
    assert records["count"].tobytes() == entries.counts.tobytes()
    assert tensors["prefixes"].tolist() == entries.keys.view(">u4")[::4].tolist()
    assert set(tensors) == {"entries", "checks", "prefixes", *(["tokens"] if ragged else [])}
    if ragged:
        assert tensors["tokens"].tobytes() == entries.tokens.tobytes()
        assert records["end"].tolist() == np.cumsum(entries.counts).tolist()
    with safe_open(shard.path, "np") as file:
        metadata = file.metadata()
    assert metadata["reference"] == IDENTITY.reference and metadata["recipe"] == IDENTITY.recipe
    assert (metadata["rows"], metadata["targets"]) == ("150", str(entries.counts.sum()))


def test_tokens_are_left_out_where_the_layout_has_none(place):
    entries = numbered(*range(100))
    shard = write(place, entries, ragged=False)
    assert not shard.layout.ragged
    plain = Entries(entries.keys, entries.sums, entries.counts)
    expect_equal(shard.find(entries.keys)[1], plain)
    # A shard with tokens answers those who do not ask for them.
    expect_equal(write(place, entries).find(entries.keys)[1], plain)


def test_the_same_entries_give_the_same_file_however_they_come(place):
    entries = numbered(*range(300))
    paths = {write(place, entries, chunks=chunks).path for chunks in (1, 2, 7, 300)}
    assert len(paths) == 1
    assert write(place, numbered(*range(301))).path not in paths


@KINDS
def test_a_lookup_reads_the_blocks_of_its_keys_and_no_more(place, ragged, monkeypatch):
    """Damage elsewhere in the shard is not read, and makes no lookup of other keys fail."""
    entries = numbered(*range(20 * BLOCK), tokens=ragged)
    shard = write(place, entries)
    sizes = []
    real = os.preadv

    def counted(descriptor, buffers, place):
        sizes.append(sum(len(buffer) for buffer in buffers))
        return real(descriptor, buffers, place)

    monkeypatch.setattr(module.os, "preadv", counted)
    row = 7 * BLOCK + 5
    _, found = shard.find(entries.keys[row : row + 1], tokens=ragged)
    expect_equal(found, entries.take(np.array([row])))
    own = 4 * int(entries.counts[row]) if ragged else 0
    assert sum(sizes) <= 2 * BLOCK * (RAGGED if ragged else PLAIN).itemsize + own
    # Another block is broken on disk: this one is still given, that one never.
    with shard.path.open("r+b") as file:
        file.seek(shard._start + 3 * BLOCK * shard.layout.record.itemsize)
        file.write(b"broken")
    expect_equal(shard.find(entries.keys[row : row + 1], tokens=ragged)[1], found)
    with pytest.raises(Damaged, match="block 3"):
        shard.find(entries.keys[3 * BLOCK + 1 : 3 * BLOCK + 2], tokens=ragged)


def test_blocks_that_have_changed_places_are_damage(place):
    entries = numbered(*range(4 * BLOCK), tokens=False)
    shard = write(place, entries)
    content = bytearray(shard.path.read_bytes())
    size, start = BLOCK * PLAIN.itemsize, shard._start
    one, two = slice(start, start + size), slice(start + size, start + 2 * size)
    content[one], content[two] = content[two], content[one]
    shard.path.write_bytes(content)
    with pytest.raises(Damaged):
        Shard(shard.path).find(entries.keys[:3])


def test_a_header_of_another_format_or_length(place):
    shard = write(place, numbered(1, 2))
    content = shard.path.read_bytes()
    for changed, words in (
        (content.replace(b'"format":"2"', b'"format":"1"'), "format '1'"),
        ((1 << 62).to_bytes(8, "little") + content[8:], "header"),
        (b"\xff" * 8 + content[8:], "header"),
        (bytes(8) + content[8:], "header"),
        ((2000).to_bytes(8, "little") + b"[" * 2000, "header"),
    ):
        shard.path.write_bytes(changed)
        with pytest.raises(Damaged, match=words):
            Shard(shard.path)


def test_take_and_concatenate_keep_ragged_runs_together():
    entries = numbered(*range(40))
    order = np.random.default_rng(0).permutation(40)
    mixed = entries.take(order)
    assert as_dict(mixed) == as_dict(entries)
    parts = [mixed.take(np.arange(0, 9)), mixed.take(np.arange(9, 9)), mixed.take(np.arange(9, 40))]
    expect_equal(concatenate(parts, tokens=True), mixed)
    assert concatenate(parts, tokens=False).tokens is None
    empty = concatenate([], tokens=True)
    assert len(empty) == 0 and empty.keys.dtype == "S16" and len(empty.tokens) == 0


@given(st.lists(any_key, max_size=60))
@settings(deadline=None)
def test_distinct_keys_are_those_of_a_sorted_set(names):
    assert raw(distinct(keys_of(names))) == sorted(set(names))
    assert raw(distinct(keys_of(sorted(set(names))))) == sorted(set(names))
