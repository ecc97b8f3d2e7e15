"""The store gives back what was appended, misses what it was not given, and notices damage."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from modern_llm.config.errors import StorageError
from modern_llm.reference.keys import entry_key
from modern_llm.reference.store import ReferenceStore, cache_root

RECIPE = {"scoring": 1, "compute": "float32", "architecture": "a"}


def entries(numbers):
    keys = np.array(
        [
            entry_key(np.arange(n % 5, dtype=np.int32), np.arange(n, dtype=np.int32))
            for n in numbers
        ],
        dtype="S16",
    )
    return keys, -np.array(numbers, dtype=np.float32) / 3, np.array(numbers, dtype=np.int32)


def make(root, **changes):
    fields = {"reference": "abc" * 10, "recipe": RECIPE} | changes
    return ReferenceStore(root, **fields)


def test_what_was_appended_is_found_bit_for_bit_in_another_process_life(tmp_path):
    store = make(tmp_path)
    store.append(*entries([7, 3, 11]))
    store.append(*entries([2, 500]))
    again = make(tmp_path)
    keys, sums, _ = entries([2, 3, 4, 500, 7, 11])
    found, values = again.lookup(keys)
    assert found.tolist() == [True, True, False, True, True, True]
    assert (values[found] == sums[found]).all()
    assert values[~found].tolist() == [0.0]
    assert len(again) == 5
    assert len(list(again.folder.glob("shard-*"))) == 2


def test_an_empty_store_finds_nothing_and_makes_no_folder(tmp_path):
    store = make(tmp_path)
    found, _ = store.lookup(entries([1, 2])[0])
    assert not found.any()
    store.append(*entries([]))
    assert not store.folder.exists()


@pytest.mark.parametrize(
    "changes", [{"reference": "abd" * 10}, {"recipe": RECIPE | {"compute": "bf16"}}]
)
def test_other_weights_or_another_recipe_miss(tmp_path, changes):
    make(tmp_path).append(*entries([1, 2]))
    found, _ = make(tmp_path, **changes).lookup(entries([1, 2])[0])
    assert not found.any()


def test_an_entry_twice_stands_once(tmp_path):
    store = make(tmp_path)
    store.append(*entries([5, 6]))
    store.append(*entries([6, 7]))
    assert len(make(tmp_path)) == 3


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path, caplog):
    store = make(tmp_path)
    store.append(*entries([7, 3]))
    (path,) = store.folder.glob("shard-*")
    intact = path.read_bytes()
    keys, sums, _ = entries([7, 3])
    caplog.set_level(logging.CRITICAL)
    damaged = [intact[:n] for n in range(0, len(intact), 7)]
    for at in range(len(intact)):
        flipped = bytearray(intact)
        flipped[at] ^= 1 << (at % 8)
        damaged.append(bytes(flipped))
    wrong = 0
    for content in damaged:
        path.write_bytes(content)
        found, values = make(tmp_path).lookup(keys)
        # Padding of the header may change without changing a value: then all must be right.
        assert not found.any() or (found.all() and (values == sums).all())
        wrong += not found.any()
        for aside in store.folder.glob("damaged-*"):
            aside.unlink()
    assert wrong >= len(damaged) * 0.9


def test_a_damaged_shard_is_set_aside_and_named(tmp_path, caplog):
    store = make(tmp_path)
    store.append(*entries([7]))
    (path,) = store.folder.glob("shard-*")
    path.write_bytes(path.read_bytes()[:-1])
    store = make(tmp_path)
    assert path.name in caplog.text
    assert not path.exists()
    assert (store.folder / f"damaged-{path.name}").exists()


def test_a_disk_that_refuses_is_one_clear_error(tmp_path):
    (tmp_path / "references").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="MODERN_LLM_CACHE"):
        make(tmp_path).append(*entries([1]))


def test_the_place_is_named_by_the_environment_or_beside_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("MODERN_LLM_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert cache_root() == tmp_path / "hf" / "modern_llm"
