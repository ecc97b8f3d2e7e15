"""Sources of rows in a fixed order: a local file, a folder, or a data set of the Hub.

`open_source` decides what a name is and refuses what cannot be read; the `Source` it returns can be
iterated (any number of times) and has an identity: the digest of its bytes, or the fingerprint that
the Hub's library gives. It does not judge rows, and runs no code that comes with a data set. Called
by `prepare`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config.errors import DataError
from modern_llm.config.printable import first_line
from modern_llm.data.read.arrow_files import read_arrow, read_parquet, rows_of
from modern_llm.data.read.folders import COMPRESSED, Found, check_type, files_of
from modern_llm.data.read.json_arrays import read_json
from modern_llm.data.read.readers import Row, Rows, read_csv, read_jsonl, read_text
from modern_llm.data.read.records import Broken
from modern_llm.storage.file_digests import file_digests
from modern_llm.storage.regular_files import open_regular

if TYPE_CHECKING:
    import datasets

READERS = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")


@dataclass(frozen=True)
class LocalFiles:
    """Files in a fixed order; `text_column` names the column of documents read from `.txt`.

    `notes` is what a user should know of files that are not read.
    """

    name: str
    files: tuple[Path, ...]
    text_column: str | None
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row | Broken]:
        for path in self.files:
            try:
                yield from self._rows(path)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error

    def _rows(self, path: Path) -> Rows:
        if path.suffix.lower() == ".txt":
            return read_text(path, self.text_column or "text")
        return READERS[path.suffix.lower()](path)

    @cached_property
    def identity(self) -> list[str]:
        """Path and digest of the bytes of every file."""
        try:
            digests = file_digests(self.files)
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read: {error.strerror or error}"
            ) from error
        return [f"{path} {digest}" for path, digest in zip(self.files, digests, strict=True)]


@dataclass(frozen=True)
class HubDataset:
    """One split of a data set that the `datasets` library has loaded (memory-mapped)."""

    name: str
    split: str
    dataset: datasets.Dataset

    def __iter__(self) -> Iterator[Row | Broken]:
        index = 0
        # As Arrow: images and sounds are not decoded, and no column is converted unasked.
        for batch in self.dataset.with_format("arrow").iter(batch_size=1000):
            for values in rows_of(batch):
                yield Row(values, f"{self.name}/{self.split}:[{index}]")
                index += 1

    @cached_property
    def identity(self) -> list[str]:
        """Name, split and the library's fingerprint of the content."""
        return [f"{self.name}/{self.split} {self.dataset._fingerprint}"]


@dataclass(frozen=True)
class StreamedDataset:
    """One split of a data set of the Hub, read over the network row by row.

    `revision` is the commit at the time of opening: a stream has no fingerprint of its content.
    """

    name: str
    split: str
    revision: str
    dataset: datasets.IterableDataset

    def __iter__(self) -> Iterator[Row | Broken]:
        try:
            for index, values in enumerate(self.dataset):
                yield Row(dict(values), f"{self.name}/{self.split}:[{index}]")
        except OSError as error:
            raise DataError(
                f"{self.name}: the stream broke off ({error}): start again, or leave out streaming"
            ) from error

    @cached_property
    def identity(self) -> list[str]:
        """Name, split and commit."""
        return [f"{self.name}/{self.split} {self.revision}"]


Source = LocalFiles | HubDataset | StreamedDataset


def open_source(
    name: str,
    *,
    split: str | None = None,
    subset: str | None = None,
    text_column: str | None = None,
    evaluation: bool = False,
    streaming: bool = False,
) -> Source:
    """Return the source that `name` refers to.

    Args:
        name: an existing file or folder; else, unless it looks like a path, a Hub id.
        split: as in `DatasetConfig.split`.
        subset: configuration name of a Hub data set, or of a folder whose README.md names some.
        text_column: given where documents are read, and only then `.txt` files are.
        evaluation: the data set is for evaluation: by default all files of a folder are taken
            (names of several splits are refused), and of a Hub data set the split "test".
        streaming: read a data set of the Hub row by row instead of fetching it first.

    Raises:
        DataError: nothing of that name, of a readable type, or of that split.
    """
    path = Path(name).expanduser()
    suffixes = [*READERS, ".txt"] if text_column is not None else list(READERS)
    if path.exists():
        if path.is_dir():
            found = files_of(path, suffixes, split, evaluation, subset)
        elif subset is not None:
            raise DataError(f"{name}: is local and has no subsets: leave out subset {subset!r}")
        else:
            found = Found((_one_file(path, suffixes, split),), ())
        for file in found.files:
            _refuse_compressed(file)
        return LocalFiles(name, found.files, text_column, found.notes)
    if path.suffix.lower() in {*READERS, ".txt", *COMPRESSED} or not _HUB_ID.fullmatch(name):
        raise DataError(f"{name}: no such file or folder: check dataset_name")
    split = split or ("test" if evaluation else "train")
    return _streamed(name, split, subset) if streaming else _from_hub(name, split, subset)


def _one_file(path: Path, suffixes: list[str], split: str | None) -> Path:
    if split not in (None, "train"):
        raise DataError(
            f"{path}: is one file and has no split {split!r}: "
            "name the file of that split, or a folder whose files are named by split"
        )
    check_type(path, suffixes)
    return path


def _refuse_compressed(path: Path) -> None:
    try:
        with open_regular(path) as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head.startswith(_MAGIC):
        raise DataError(f"{path}: is compressed, whatever its name: unpack it first")


def _from_hub(name: str, split: str, subset: str | None) -> HubDataset:
    # Takes a second to import, and nothing local needs it.
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises its own, the network's and Python's errors
        raise _not_loaded(name, split, error) from error
    return HubDataset(name, split, dataset)


def _streamed(name: str, split: str, subset: str | None) -> StreamedDataset:
    import datasets
    from huggingface_hub import HfApi

    try:
        dataset = datasets.load_dataset(name, subset, split=split, streaming=True)
        revision = HfApi().dataset_info(name).sha or "unknown"
    except Exception as error:
        raise _not_loaded(name, split, error) from error
    return StreamedDataset(name, split, revision, dataset)


def _not_loaded(name: str, split: str, error: Exception) -> DataError:
    return DataError(
        f"{name}: is no local file or folder, and split {split!r} of a Hub data set of that id "
        f"could not be loaded ({type(error).__name__}: {first_line(error)}): check the id, subset, "
        "split and connection, or give a file"
    )
