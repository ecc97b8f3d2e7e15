"""The store returns what was appended, misses everything else, and names what differs."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from modern_llm.config.errors import StorageError
from modern_llm.reference.keys import entry_key
from modern_llm.reference.store import compaction, store
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.layout import Identity
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.storage import atomic
from modern_llm.storage.file_digests import cache_root

RECIPE = '{"compute": "float32", "scoring": 2}'


def entries(numbers, tokens=False):
    keys = np.array(
        [
            entry_key(np.arange(n % 5, dtype=np.int32), np.arange(n, dtype=np.int32))
            for n in numbers
        ],
        dtype="S16",
    )
    counts = np.array(numbers, dtype=np.int32)
    values = np.concatenate([np.zeros(0), *[-np.arange(n) / (n + 1) for n in numbers]])
    sums = -counts.astype(np.float32) / 3
    return Entries(keys, sums, counts, values.astype(np.float32) if tokens else None)


def make(root, **changes):
    identity = Identity("abc" * 10, RECIPE)._replace(**changes)
    return ReferenceStore.at(root, identity)


def found(stored, numbers, **options):
    """Which of some entries a store holds, with the values checked."""
    expected = entries(numbers, **options)
    result = stored.find(expected.keys, **options)
    at = np.flatnonzero(np.isin(expected.keys, result.keys))
    expected = expected.take(at).take(np.argsort(expected.keys[at]))
    assert (result.keys == expected.keys).all()
    assert (result.sums == expected.sums).all() and (result.counts == expected.counts).all()
    if options.get("tokens"):
        assert (result.tokens == expected.tokens).all()
    return [numbers[i] for i in at]


@pytest.mark.parametrize("tokens", [False, True])
def test_what_was_appended_is_found_bit_for_bit_in_another_process_life(tmp_path, tokens):
    stored = make(tmp_path)
    stored.append(entries([7, 3, 11], tokens))
    stored.append(entries([2, 500], tokens))
    again = make(tmp_path)
    assert found(again, [2, 3, 4, 500, 7, 11], tokens=tokens) == [2, 3, 500, 7, 11]
    assert len(again.find(np.repeat(entries([7, 4, 2]).keys, 3))) == 2
    assert len(again) == 5
    assert len(list(again.folder.glob("shard-*"))) == 2


def test_an_empty_store_finds_nothing_and_makes_no_folder(tmp_path):
    stored = make(tmp_path)
    assert found(stored, [1, 2]) == []
    stored.append(entries([]))
    assert not stored.folder.exists()


@pytest.mark.parametrize("changes", [{"reference": "abd" * 10}, {"recipe": RECIPE + " "}])
def test_other_weights_or_another_recipe_miss(tmp_path, changes):
    make(tmp_path).append(entries([1, 2]))
    assert found(make(tmp_path, **changes), [1, 2]) == []


def test_entries_without_token_values_miss_where_these_are_asked_for(tmp_path):
    stored = make(tmp_path)
    stored.append(entries([5, 6]))
    stored.append(entries([7], tokens=True))
    assert found(stored, [5, 6, 7]) == [5, 6, 7]
    assert found(stored, [5, 6, 7], tokens=True) == [7]
    stored.append(entries([5], tokens=True))
    assert found(stored, [5, 6, 7], tokens=True) == [5, 7]


def test_an_entry_in_several_shards_is_found_once(tmp_path):
    stored = make(tmp_path)
    stored.append(entries([5, 6]))
    stored.append(entries([6, 7]))
    assert found(stored, [5, 6, 7]) == [5, 6, 7]
    stored.compact()
    assert len(stored) == 3 and len(stored.shards) == 1
    assert found(stored, [5, 6, 7]) == [5, 6, 7]
    # What is joined already stays: its new name is its old one.
    stored.append(entries([6]))
    stored.compact()
    assert len(stored) == 3 and found(make(tmp_path), [5, 6, 7]) == [5, 6, 7]


def test_many_small_shards_become_few(tmp_path):
    stored = make(tmp_path)
    for number in range(3 * compaction.COMPACTED_AT_ONCE):
        stored.append(entries([number]))
    assert len(stored.shards) < compaction.COMPACTED_AT_ONCE
    assert {path.name for path in stored.folder.glob("shard-*")} == {
        shard.path.name for shard in stored.shards
    }
    numbers = list(range(3 * compaction.COMPACTED_AT_ONCE))
    assert found(make(tmp_path), numbers) == numbers


def test_a_reader_finds_what_was_joined_under_its_hands(tmp_path):
    writer = make(tmp_path)
    writer.append(entries([5, 6]))
    writer.append(entries([8]))
    reader = make(tmp_path)
    writer.compact()
    assert found(reader, [5, 6, 8]) == [5, 6, 8]


def test_only_what_is_needed_is_kept(tmp_path):
    stored = make(tmp_path)
    stored.append(entries([1, 2, 3]))
    stored.append(entries([3, 4, 5], tokens=True))
    wanted = entries([2, 4, 9]).keys
    assert stored.keep_only(wanted) == 2
    assert found(make(tmp_path), [1, 2, 3, 4, 5, 9]) == [2, 4]
    assert stored.keep_only(wanted) == 2  # nothing to change: the same shards are written again
    assert found(make(tmp_path), [1, 2, 3, 4, 5, 9]) == [2, 4]


def test_a_store_is_taken_over_but_for_what_is_damaged(tmp_path):
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    one.append(entries([1, 2]))
    two.append(entries([3]))
    two.append(entries([4]))
    path = two.shards[0].path
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    one.copy_from(two)
    assert len(found(one, [1, 2, 3, 4])) == 3
    assert path.exists(), "the source stays as it is"


def test_a_store_says_itself_whose_values_it_holds(tmp_path):
    stored = make(tmp_path)
    stored.append(entries([1]))
    assert ReferenceStore.open(stored.folder).identity == stored.identity
    (stored.folder / "MANIFEST.json").unlink()  # every shard says the same
    assert ReferenceStore.open(stored.folder).identity == stored.identity
    stored.append(entries([2]))
    content = json.loads((stored.folder / "MANIFEST.json").read_text())
    assert content["reference"] == stored.identity.reference
    with pytest.raises(StorageError, match="no reference store"):
        ReferenceStore.open(tmp_path)


def test_a_disk_that_refuses_is_one_clear_error(tmp_path):
    (tmp_path / "references").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="MODERN_LLM_CACHE"):
        make(tmp_path).append(entries([1]))
    with pytest.raises(StorageError, match="MODERN_LLM_CACHE"):
        make(tmp_path).check_space(1, 1, tokens=False)


def test_too_little_room_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "free_bytes", lambda folder: 10_000_000)
    stored = make(tmp_path)
    stored.check_space(300_000, 10**8, tokens=False)
    with pytest.raises(StorageError, match=r"needs 3[12]\.\d MB, 10\.0 MB are free: 2[12]\.\d MB"):
        stored.check_space(10**6, 10**8, tokens=False)
    with pytest.raises(StorageError, match=r"are missing"):
        stored.check_space(100_000, 10**7, tokens=True)
    assert [path.name for path in stored.folder.iterdir()] == ["MANIFEST.json"]


def test_room_that_runs_out_keeps_what_was_committed(tmp_path, monkeypatch):
    stored = make(tmp_path)
    stored.append(entries([1, 2]))
    real = os.fsync

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(store, "free_bytes", lambda folder: 100)
    with pytest.raises(StorageError, match=r"No space left on device; 0\.\d+ MB are missing"):
        stored.append(entries(range(1000, 5000)))
    monkeypatch.setattr(os, "fsync", real)
    assert not list(stored.folder.glob(".tmp-*"))
    assert found(make(tmp_path), [1, 2]) == [1, 2]


def test_a_shard_that_cannot_be_read_is_passed_over_and_named(tmp_path, monkeypatch, caplog):
    stored = make(tmp_path)
    stored.append(entries([1]))
    stored.append(entries([2]))
    broken = stored.shards[0].path
    real = os.preadv

    def preadv(descriptor, *args):
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(broken):
            raise OSError(5, "Input/output error")
        return real(descriptor, *args)

    monkeypatch.setattr(os, "preadv", preadv)
    assert len(found(stored, [1, 2])) == 1
    assert broken.name in caplog.text and "Input/output error" in caplog.text
    assert broken.exists()


def test_the_place_is_named_by_the_environment_or_beside_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("MODERN_LLM_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert cache_root() == tmp_path / "hf" / "modern_llm"


def test_free_room_is_that_of_the_nearest_folder_that_exists(tmp_path):
    assert atomic.free_bytes(tmp_path / "not" / "there") > 0


@pytest.mark.parametrize("name", ["shard", "mark", "manifest"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name, caplog):
    stored = make(tmp_path)
    stored.append(entries(range(5)))
    stored.marks.add(entries(range(9, 10)).keys)
    patterns = {"shard": "*.safetensors", "mark": "not-finite-*.json", "manifest": "MANIFEST.json"}
    found_files = [p for p in stored.folder.iterdir() if p.match(patterns[name])]
    assert found_files, sorted(p.name for p in stored.folder.iterdir())
    for path in found_files:
        path.unlink()
        os.mkfifo(path)
    again = make(tmp_path)
    if name == "shard":
        assert len(again) == 0 and "a named pipe, not a regular file" in caplog.text
    elif name == "mark":
        assert len(again.marks.keys()) == 0 and "cannot be read" in caplog.text
    else:
        ReferenceStore.open(stored.folder)
