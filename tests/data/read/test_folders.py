"""Folders in the Hub's layout: files of a split, skipped files, refused files."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import datasets
import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.read.sources import open_source
from modern_llm.data.table.build import prepare_tables


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_dict({"text": [name]}).to_parquet(str(path))
        else:
            path.write_text(f'{{"text": "{name}"}}\n')


def read(folder: Path, **options) -> list[str]:
    return [row.values["text"] for row in open_source(str(folder), **options)]


HASH = "0a1b2c3d4e5f6789"
SPLIT_BY_A_WORD = {
    "data-test-00000-of-00002.jsonl": "test",
    "hh_test_0.jsonl": "test",
    "hh_test.jsonl": "test",
    "part1.test.v2.jsonl": "test",
    "HHTest.jsonl": "test",
    "hhTest3.jsonl": "test",
    "test1.jsonl": "test",
    "testset.jsonl": "test",
    "en/test/0000.jsonl": "test",
    "en-test/0000.jsonl": "test",
    f"data/test-00000-of-00001-{HASH}.jsonl": "test",
    "harmless_eval_2.jsonl": "eval",
    "pairs-dev-v1.jsonl": "dev",
    "my-val-set.jsonl": "validation",
    "split_validation_all.jsonl": "validation",
    "held_out.jsonl": "holdout",
    "pairs-train-00000-of-00001.jsonl": "train",
    "trainset.jsonl": "train",
    "plain.jsonl": "train",
    "latest.jsonl": "train",
    "contest/attested.jsonl": "train",
    "00000.jsonl": "train",
}


@pytest.mark.parametrize("name", SPLIT_BY_A_WORD)
def test_a_split_is_found_by_any_word_of_a_name(name: str, tmp_path: Path):
    put(tmp_path, name, "of_train.jsonl")
    split = SPLIT_BY_A_WORD[name]
    if split == "train":
        assert sorted(read(tmp_path)) == sorted([name, "of_train.jsonl"])
    else:
        assert read(tmp_path) == ["of_train.jsonl"]
        assert read(tmp_path, split=split) == [name]


ULTRAFEEDBACK = [
    f"data/{split}-00000-of-00001{tail}.parquet"
    for split in ("test_gen", "test_prefs", "test_sft", "train_gen", "train_prefs", "train_sft")
    for tail in ("", f"-{HASH}")[: 1 + (split == "train_gen")][-1:]
]


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A folder as written by `snapshot_download`: links to blobs, metadata, and its own cache."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    put(blobs, *ULTRAFEEDBACK)
    for name in ULTRAFEEDBACK:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(blobs / name)
    (folder / "README.md").write_text("---\nconfigs: []\n---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    put(folder, ".cache/huggingface/download/data/x.json")
    return folder


def test_a_snapshot_of_the_hub_is_read_by_the_names_of_its_splits(snapshot: Path):
    for split in ("train_prefs", "train_sft", "train_gen", "test_prefs"):
        (found,) = read(snapshot, split=split)
        assert f"/{split}-" in found
    for split in ("train", "test"):
        names = ", ".join(f"{split}_{kind}" for kind in ("gen", "prefs", "sft"))
        with pytest.raises(DataError, match=f"several splits for '{split}': {names}: choose one"):
            open_source(str(snapshot), split=split)
    with pytest.raises(DataError, match="several splits for 'train'"):
        open_source(str(snapshot))
    with pytest.raises(DataError, match=r"splits \['test', 'train'\]: choose one"):
        open_source(str(snapshot), evaluation=True)
    with pytest.raises(DataError, match="no file of the split 'validation'"):
        open_source(str(snapshot), split="validation")


def test_a_bare_split_comes_before_its_variants(tmp_path: Path):
    put(tmp_path, "train-00000-of-00001.jsonl", "train_sft-00000-of-00001.jsonl")
    assert read(tmp_path) == ["train-00000-of-00001.jsonl"]
    assert read(tmp_path, split="train_sft") == ["train_sft-00000-of-00001.jsonl"]


def test_one_variant_alone_is_the_split(tmp_path: Path):
    put(tmp_path, "train_prefs-00000-of-00001.jsonl", "test_prefs-00000-of-00001.jsonl")
    assert read(tmp_path) == ["train_prefs-00000-of-00001.jsonl"]
    assert read(tmp_path, split="test") == ["test_prefs-00000-of-00001.jsonl"]


def test_parts_and_shards_of_one_split_are_read_together(tmp_path: Path):
    names = [f"train-{at:05d}-of-00002.jsonl" for at in range(2)]
    names += ["harmless_train.jsonl", "helpful_train.jsonl", "hh_train_0.jsonl", "hh_train_1.jsonl"]
    put(tmp_path, *names)
    assert sorted(read(tmp_path)) == sorted(names)


@pytest.mark.parametrize("name", ["train_test.jsonl", "test/train.jsonl", "dev-train-3.jsonl"])
def test_a_name_of_two_splits_is_refused(name: str, tmp_path: Path):
    put(tmp_path, name, "a.jsonl")
    with pytest.raises(DataError, match=f"{name}: its name holds the splits"):
        open_source(str(tmp_path))


def test_a_folder_of_all_splits_logs_nothing(tmp_path: Path):
    put(tmp_path, "train_test_split/train.jsonl", "train_test_split/test.jsonl")
    assert read(tmp_path) == ["train_test_split/train.jsonl"]
    assert read(tmp_path, split="test") == ["train_test_split/test.jsonl"]


def test_evaluation_data_of_one_split_need_not_name_it(tmp_path: Path):
    put(tmp_path, "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl")
    assert len(read(tmp_path, evaluation=True)) == 2


def test_a_data_set_saved_to_disk_is_read(tmp_path: Path):
    datasets.disable_progress_bars()
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(6)]})
        for name in ("train", "test_prefs")
    }
    datasets.DatasetDict(parts).save_to_disk(
        str(tmp_path / "d"), num_shards={"train": 3, "test_prefs": 1}
    )
    for stray in ("cache-0123456789abcdef.arrow", "tmpabc.arrow"):
        shutil.copy(
            tmp_path / "d" / "train" / "data-00000-of-00003.arrow", tmp_path / "d" / "train" / stray
        )
    assert read(tmp_path / "d") == [f"train {i}" for i in range(6)]
    assert read(tmp_path / "d", split="test_prefs") == [f"test_prefs {i}" for i in range(6)]
    assert read(tmp_path / "d", split="test") == [f"test_prefs {i}" for i in range(6)]
    # One of its splits, by its own folder.
    assert read(tmp_path / "d" / "test_prefs") == [f"test_prefs {i}" for i in range(6)]
    (tmp_path / "d" / "train" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: is missing, and .*state"):
        open_source(str(tmp_path / "d"))


def test_files_that_are_not_read_are_named_in_the_report(tmp_path, jsonl, pairs, tokenizer):
    for name in ("d/train-00000-of-00002.jsonl", "d/test.jsonl", "d/hh_dev_1.jsonl"):
        jsonl(pairs(6), name)
    config = PreferenceDatasetConfig(dataset_name=str(tmp_path / "d"))
    lines = prepare_tables(config, tokenizer, tmp_path / "t", max_length=96).lines()
    assert any(line.endswith("1 of 3 files are read, not hh_dev, test") for line in lines), lines
    assert any("train: 1 of 2 shards are there" in line for line in lines), lines


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"])
def test_other_than_regular_files_are_refused_at_once(
    kind: str, suffix: str, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the length of a socket's name is limited
    path = Path(f"rows{suffix}")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    name = {"pipe": "a named pipe", "socket": "a socket", "device": "a device"}[kind]
    for place in (str(path), str(tmp_path)):
        with pytest.raises(DataError, match=f"rows{suffix}: cannot be read: {name}, not a regular"):
            open_source(place, text_column="text")
