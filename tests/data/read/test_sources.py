"""Resolution of a data set's name, order of its files, and names that are refused at once."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import datasets
import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.read.readers import Row
from modern_llm.data.read.sources import open_source


def put(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            path.write_text(f"text\n{name}\n")
        else:
            path.write_text(f'{{"text": "{name}"}}\n')


def read(folder: Path, **options) -> list[str]:
    return [row.values["text"] for row in open_source(str(folder), **options)]


def test_a_file_can_be_read_twice_and_is_identified_by_its_bytes(tmp_path: Path):
    put(tmp_path, "a.jsonl")
    source = open_source(str(tmp_path / "a.jsonl"))
    assert list(source) == list(source) == [Row({"text": "a.jsonl"}, f"{tmp_path}/a.jsonl:1")]
    before = source.identity
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert open_source(str(tmp_path / "a.jsonl")).identity == before
    (tmp_path / "a.jsonl").write_text('{"text": "b.jsonl"}\n')
    assert open_source(str(tmp_path / "a.jsonl")).identity != before


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path):
    put(tmp_path, "b.jsonl", "a/z.csv", "c.json", "a.jsonl", ".hidden.jsonl", ".cache/x.jsonl")
    (tmp_path / "README.md").write_text("words")
    assert read(tmp_path) == ["a/z.csv", "a.jsonl", "b.jsonl", "c.json"]


def test_text_files_are_documents_and_nothing_else(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read(tmp_path, text_column="text") == ["one", "two"]
    with pytest.raises(DataError, match="no file of a type .jsonl .json .csv .parquet .arrow$"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"a\.txt: cannot read \.txt: one of .jsonl"):
        open_source(str(tmp_path / "a.txt"))


def test_a_split_of_a_folder_is_found_by_names(tmp_path: Path):
    put(tmp_path, "train-00000-of-2.jsonl", "extra.jsonl", "hh_test.jsonl", "valid/a.jsonl")
    put(tmp_path, "test_prefs-0.jsonl")
    assert read(tmp_path) == ["extra.jsonl", "train-00000-of-2.jsonl"]
    assert read(tmp_path, split="train") == read(tmp_path)
    assert read(tmp_path, split="test") == ["hh_test.jsonl", "test_prefs-0.jsonl"]
    assert read(tmp_path, split="validation") == ["valid/a.jsonl"]
    assert read(tmp_path, split="test_prefs") == ["test_prefs-0.jsonl"]
    with pytest.raises(DataError, match=r"splits \['test', 'train', 'validation'\]: choose one"):
        open_source(str(tmp_path), evaluation=True)
    with pytest.raises(
        DataError, match=r"no file of the split 'dev', only of \['test', 'train', 'val"
    ):
        open_source(str(tmp_path), split="dev")


def test_one_file_has_no_splits(tmp_path: Path):
    put(tmp_path, "a.jsonl")
    open_source(str(tmp_path / "a.jsonl"), split="train")
    with pytest.raises(DataError, match=r"a\.jsonl: is one file and has no split 'test'"):
        open_source(str(tmp_path / "a.jsonl"), split="test")
    with pytest.raises(DataError, match="has no subsets: leave out subset 'en'"):
        open_source(str(tmp_path / "a.jsonl"), subset="en")


@pytest.mark.parametrize(
    "name", ["missing.jsonl", "./missing", "/missing/folder", "a/b/c", "data.jsonl.gz", "~/x.csv"]
)
def test_a_missing_path_is_not_taken_for_a_hub_id(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    with pytest.raises(DataError, match=f"^{name}: no such file or folder"):
        open_source(name)


def test_compressed_files_are_refused_under_any_name(tmp_path: Path):
    packed = gzip.compress(b'{"text": "a"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "b.jsonl").write_bytes(packed)
    for name in ("a.jsonl.gz", "b.jsonl"):
        with pytest.raises(DataError, match=f"{name}: is compressed.*: unpack it first"):
            open_source(str(tmp_path / name))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: is compressed"):
        open_source(str(tmp_path))


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path):
    put(tmp_path, "a.jsonl")
    source = open_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: No such file"):
        list(source)


def test_an_unknown_hub_id_is_one_clear_error_without_network():
    with pytest.raises(DataError) as caught:
        open_source("nobody-at-all/no-such-data")
    text = str(caught.value)
    assert text.startswith("nobody-at-all/no-such-data: is no local file or folder")
    assert "check the id, subset, split and connection" in text and "\n" not in text


def test_a_hub_data_set_is_loaded_through_datasets(monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": [{"role": "a", "content": None}]} for i in range(2500)]
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("owner/data", subset="en", split="train_prefs")
    assert asked == [(("owner/data", "en"), {"split": "train_prefs"})]
    found = list(source)
    assert [row.values for row in found] == rows
    assert found[1001].origin == "owner/data/train_prefs:[1001]"
    assert source.identity[0].startswith("owner/data/train_prefs ")
    open_source("owner/data")
    open_source("owner/data", evaluation=True)
    assert [options["split"] for _, options in asked[1:]] == ["train", "test"]
