"""Snapshots of the Hub whose README.md lists the files of each split and configuration."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset

from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.read.sources import open_source


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{name}"}}\n')


def say(folder: Path, configs: Any, *, front: str | None = None) -> None:
    text = (
        yaml.safe_dump({"license": "mit", "configs": configs}, sort_keys=False)
        if front is None
        else front
    )
    (folder / "README.md").write_text(f"---\n{text}---\n# Data\n---\n")


def read(folder: Path, **options) -> list[str]:
    return [row.values["text"] for row in open_source(str(folder), **options)]


FILES = ("data/a-0.jsonl", "data/a-1.jsonl", "data/b.jsonl", "more/deep/c.jsonl", "d.jsonl")
FORMS = {
    "entries": [
        {"split": "train", "path": "data/a-*.jsonl"},
        {"split": "test", "path": ["data/b.jsonl", "more/**"]},
    ],
    "object": {"train": "data/a-*", "test": ["**/b.jsonl", "more/*/c.jsonl"]},
    "one pattern": "data/a-?.jsonl",
    "patterns": ["data/a-0.jsonl", "data/a-1.jsonl"],
}


@pytest.mark.parametrize("form", FORMS)
def test_splits_are_those_of_the_readme_and_of_the_library(form, tmp_path):
    put(tmp_path / "x", *FILES)
    say(tmp_path / "x", [{"config_name": "default", "data_files": FORMS[form]}])
    train = ["data/a-0.jsonl", "data/a-1.jsonl"]
    assert read(tmp_path / "x") == train == read(tmp_path / "x", subset="default")
    splits = {"train": train}
    if form in ("entries", "object"):
        splits["test"] = ["data/b.jsonl", "more/deep/c.jsonl"]
    for split, files in splits.items():
        assert read(tmp_path / "x", split=split) == files
    if form != "object":
        cache = str(tmp_path / "cache")
        for split, files in splits.items():
            theirs = load_dataset(str(tmp_path / "x"), split=split, cache_dir=cache)
            assert sorted(theirs["text"]) == files
    with pytest.raises(DataError, match=r"has no split 'validation', only \['train'.*choose one"):
        read(tmp_path / "x", split="validation")
    if "test" in splits:
        with pytest.raises(DataError, match=r"has the splits .* choose one \(eval_split\)"):
            read(tmp_path / "x", evaluation=True)
    else:
        assert read(tmp_path / "x", evaluation=True) == train


def test_one_of_several_configurations_is_chosen(tmp_path):
    put(tmp_path, "en/train.jsonl", "en/test.jsonl", "de/train.jsonl", "fr.jsonl")
    configs = [
        {"config_name": "en", "data_dir": "en"},
        {"config_name": "de", "data_dir": "de", "data_files": "train*"},
    ]
    say(tmp_path, configs)
    with pytest.raises(DataError, match=r"several subsets: en, de: choose one \(subset: en\)"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no subset 'fr', only en, de"):
        read(tmp_path, subset="fr")
    assert read(tmp_path, subset="en", split="test") == ["en/test.jsonl"]
    assert read(tmp_path, subset="de") == ["de/train.jsonl"]
    say(tmp_path, [configs[0], {**configs[1], "default": True}])
    assert read(tmp_path) == ["de/train.jsonl"]
    say(tmp_path, [configs[0], {"config_name": "default", "data_files": "fr.jsonl"}])
    assert read(tmp_path) == ["fr.jsonl"]
    config = PreferenceDatasetConfig(dataset_name=str(tmp_path), subset="en")
    assert config.subset == "en"


def test_variants_of_a_split_need_a_choice(tmp_path):
    put(tmp_path, "a.jsonl", "b.jsonl")
    say(tmp_path, [{"data_files": {"train_sft": "a.jsonl", "train_prefs": "b.jsonl"}}])
    with pytest.raises(DataError, match=r"no split 'train', only \['train_sft', 'train_prefs'\]"):
        read(tmp_path)
    assert read(tmp_path, split="train_prefs") == ["b.jsonl"]
    say(tmp_path, [{"data_files": {"train_sft": "a.jsonl", "test_sft": "b.jsonl"}}])
    assert read(tmp_path) == ["a.jsonl"] and read(tmp_path, split="test") == ["b.jsonl"]


@pytest.mark.parametrize(
    "pattern",
    [
        "../out.jsonl",
        "/etc/*.jsonl",
        "data/../../out.jsonl",
        "hf://datasets/x/a.jsonl",
        "~/a.jsonl",
    ],
)
def test_no_path_leaves_the_folder(pattern, tmp_path):
    put(tmp_path, "out.jsonl", "x/data/a.jsonl")
    for entry in ({"data_files": pattern}, {"data_dir": pattern}):
        say(tmp_path / "x", [entry])
        with pytest.raises(DataError, match=r"README\.md: configs\[0\].* leaves the folder"):
            read(tmp_path / "x")
    (tmp_path / "x/link").symlink_to(tmp_path)
    for entry in ({"data_dir": "link"}, {"data_dir": "link", "data_files": "out.jsonl"}):
        say(tmp_path / "x", [entry])
        with pytest.raises(DataError, match=r"data_dir 'link' leaves the folder"):
            read(tmp_path / "x")
    say(tmp_path / "x", [{"data_files": "link/out.jsonl"}])
    with pytest.raises(DataError, match="no file fits"):
        read(tmp_path / "x")


ODD = {
    "no list": {"a": 1},
    "no object": [1],
    "name": [{"config_name": [1], "data_files": "a.jsonl"}],
    "files": [{"data_files": 5}],
    "no files": [{"data_files": []}],
    "no path": [{"data_files": [{"split": "train"}]}],
    "mixed": [{"data_files": ["a", {"split": "train", "path": "a"}]}],
    "split": [{"data_files": {1: "a.jsonl"}}],
    "many": [{"data_files": ["a"] * 2000}],
    "long": [{"data_files": "a" * 1000}],
    "directory": [{"data_dir": [1]}],
    "twice": [{"data_files": "a.jsonl"}] * 2,
}


@pytest.mark.parametrize("name", ODD)
def test_an_invalid_configuration_is_named(name, tmp_path):
    put(tmp_path, "a.jsonl")
    say(tmp_path, ODD[name])
    with pytest.raises(DataError, match=r"README\.md: .*repair it, or remove the file") as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20)
)


@pytest.mark.parametrize("front", [BOMB, "a: [\n", "configs: !!python/object:os.x {}\n", "\x00\n"])
def test_a_front_matter_that_cannot_be_read_is_refused(front, tmp_path):
    put(tmp_path, "a.jsonl")
    say(tmp_path, None, front=front)
    began = time.monotonic()
    with pytest.raises(DataError, match="front matter cannot be read"):
        read(tmp_path)
    assert time.monotonic() - began < 20


def test_a_readme_without_configurations_changes_nothing(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl")
    for text in ("", "# Data\n", "---\nnever closed\n", "---\n---\n", "---\nlicense: mit\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert read(tmp_path) == ["train.jsonl"]
    (tmp_path / "README.md").write_bytes(b"---\n" + b"a: b\n" * 400_000)
    with pytest.raises(DataError, match="has more than"):
        read(tmp_path)
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    with pytest.raises(DataError, match="a named pipe"):
        read(tmp_path)


def test_a_star_pattern_takes_linear_time(tmp_path):
    put(tmp_path, f"{'a' * 100}.jsonl")
    say(tmp_path, [{"data_files": ["*a" * 200 + "b", "**/" * 150 + "b"]}])
    began = time.monotonic()
    with pytest.raises(DataError, match="no file fits"):
        read(tmp_path)
    assert time.monotonic() - began < 20
