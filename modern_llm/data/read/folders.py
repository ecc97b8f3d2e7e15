"""Selection of the files of a folder that belong to a split.

Knows folders as the Hub and the `datasets` library leave them: snapshots of repositories, shards,
`save_to_disk`. A split is found by any word of a file's name or of its folders' names. Where names
leave more than one reading, the folder is refused with the choices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from modern_llm.config.errors import DataError
from modern_llm.data.read.card_configs import (
    CARD,
    CardConfig,
    card_configs,
    choose_config,
    matching,
)
from modern_llm.storage.regular_files import check_regular, read_text

SPLITS = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "test": "test",
    "testing": "test",
    "testset": "test",
    "eval": "eval",
    "evaluation": "eval",
    "evalset": "eval",
    "dev": "dev",
    "devset": "dev",
    "valid": "validation",
    "val": "validation",
    "valset": "validation",
    "validation": "validation",
    "holdout": "holdout",
    "heldout": "holdout",
}
COMPRESSED = {".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SHARD = re.compile(r"[-_.]?(\d{4,6})[-_]of[-_](\d{1,6})([-_.][0-9a-f]{8,64})?$", re.IGNORECASE)
_NUMBER = re.compile(r"([-_.]?\d+)+$")


@dataclass(frozen=True)
class Found:
    """Files of a split in the order of their paths, with remarks about the other files."""

    files: tuple[Path, ...]
    notes: tuple[str, ...]


def files_of(
    folder: Path,
    suffixes: Sequence[str],
    split: str | None,
    every: bool,
    subset: str | None = None,
) -> Found:
    """Return the files of a split: as the README.md of the folder says, else by their names.

    Args:
        suffixes: types that can be read.
        split: its name; None is "train".
        subset: the one of the configurations in README.md.
        every: all files are wanted where no split is given and the names hold one at most.

    Raises:
        DataError: there is none, one cannot be read, or the names leave a choice.
    """
    config = choose_config(folder, card_configs(folder), subset)
    if config is not None and not _stays_in(folder, folder / config.folder):
        raise DataError(f"{folder / CARD}: data_dir {str(config.folder)!r} leaves the folder")
    if config is not None and config.splits is not None:
        return _of_config(folder, config, suffixes, split, every)
    if config is not None:
        folder = folder / config.folder
    readable = _data_files(folder, suffixes)
    names = {path: _Name(path.relative_to(folder)) for path in readable}
    if every and split is None:
        splits = sorted({split for name in names.values() for split in name.splits})
        if len(splits) > 1:
            raise DataError(
                f"{folder}: holds files of the splits {splits}: choose one (eval_split)"
            )
        files = readable
    else:
        files = _of_split(folder, names, split or "train")
    notes = _missing_shards(files)
    if rest := sorted({names[path].label for path in set(readable).difference(files)}):
        of = f"{len(files)} of {len(readable)} files are read"
        notes.insert(0, f"{folder}: {of}, not {', '.join(rest)}")
    return Found(tuple(files), tuple(notes))


def _of_config(
    folder: Path, config: CardConfig, suffixes: Sequence[str], split: str | None, every: bool
) -> Found:
    """The files that README.md names for a split."""
    assert config.splits is not None
    names = list(config.splits)
    place = f"{folder / CARD}: subset {config.name!r}"
    if split is None and every and len(names) > 1:
        raise DataError(f"{place} has the splits {names}: choose one (eval_split)")
    wanted = names[0] if split is None and every else split or "train"
    if wanted not in names:
        kind = SPLITS.get(wanted)
        near = [name for name in names if kind is not None and kind in _splits_in(name)]
        if len(near) != 1:
            raise DataError(
                f"{place} has no split {wanted!r}, only {names}: choose one (split: {names[0]})"
            )
        wanted = near[0]
    root = folder / config.folder
    inside = {PurePosixPath(path.relative_to(root).as_posix()): path for path in _inside(root)}
    files = sorted(inside[name] for name in matching(list(inside), config.splits[wanted]))
    if not files:
        raise DataError(
            f"{place}, split {wanted!r}: no file fits {config.splits[wanted][:5]}: fetch the files"
        )
    for path in files:
        check_type(path, suffixes)
    _check_regular(files)
    chosen = f"split {wanted!r} of subset {config.name!r}, as {CARD} says"
    notes = [f"{folder}: {len(files)} files are read: {chosen}", *_missing_shards(files)]
    return Found(tuple(files), tuple(notes))


class _Name:
    """The split named in a file's path, relative to the folder of the data."""

    def __init__(self, path: Path):
        self.path = path
        series = _SHARD.sub("", path.stem)
        stem = _NUMBER.sub("", series) or path.stem
        parts = [*path.parts[:-1], stem]
        self.names = {*parts, series, path.stem}
        found = [list(dict.fromkeys(_splits_in(part))) for part in parts]
        # A folder `train_test_split` says nothing of the files in it.
        told = [splits for splits in found[:-1] if len(splits) == 1] + [found[-1]]
        self.splits = frozenset(split for splits in told for split in splits)
        at = next((at for at in range(len(parts) - 1, -1, -1) if found[at]), len(parts) - 1)
        self.label = parts[at]

    @property
    def variant(self) -> str | None:
        """The name of a split such as `train_prefs`, None where it is the bare word or none."""
        words = _WORDS.findall(self.label)
        begins = len(words) > 1 and words[0].lower() in SPLITS
        return self.label if begins else None


def _splits_in(part: str) -> list[str]:
    words = [word.lower() for word in _WORDS.findall(part)]
    words += [a + b for a, b in zip(words, words[1:], strict=False) if (a, b) == ("held", "out")]
    return [SPLITS[word] for word in words if word in SPLITS]


def _of_split(folder: Path, names: dict[Path, _Name], wanted: str) -> list[Path]:
    exact = [path for path, name in names.items() if wanted in name.names]
    kind = SPLITS.get(wanted)
    if kind is None:
        files = exact
    else:
        files = [path for path, name in names.items() if kind in (name.splits or {"train"})]
        _refuse_two_splits(folder, [names[path] for path in files])
        if exact:
            files = [p for p in files if p in exact or names[p].variant is None]
        variants = sorted({v for path in files if (v := names[path].variant)})
        if len(variants) > 1:
            raise DataError(
                f"{folder}: has several splits for {wanted!r}: {', '.join(variants)}: choose one "
                f"(split: {variants[0]})"
            )
    if not files:
        found = sorted({split for name in names.values() for split in name.splits or {"train"}})
        raise DataError(
            f"{folder}: has no file of the split {wanted!r}, only of {found}: "
            "set the split, or rename the files"
        )
    return files


def _refuse_two_splits(folder: Path, names: Sequence[_Name]) -> None:
    for name in names:
        if "train" in name.splits and len(name.splits) > 1:
            raise DataError(
                f"{folder / name.path}: its name holds the splits {sorted(name.splits)}: rename "
                "it, or give the files of the split in a folder of their own"
            )


def _data_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files of the data, sorted by path; hidden files, metadata and other types are skipped."""
    inside = _inside(folder)
    for path in inside:
        # Skipping a compressed file would silently train on a part of the data.
        _refuse_compressed(path)
    found = [p for p in inside if p.suffix.lower() in suffixes and p.name not in _METADATA]
    saved = {path.parent: _saved_files(path) for path in inside if path.name == "state.json"}
    found = [p for p in found if p.parent not in saved or p in (saved[p.parent] or [p])]
    if not found:
        raise DataError(f"{folder}: holds no file of a type {' '.join(suffixes)}")
    _check_regular(found)
    return found


def check_type(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file that is compressed, or of a type that cannot be read."""
    _refuse_compressed(path)
    if path.suffix.lower() not in suffixes:
        kind = path.suffix or "no suffix"
        raise DataError(f"{path}: cannot read {kind}: one of {' '.join(suffixes)} belongs here")


def _refuse_compressed(path: Path) -> None:
    if path.suffix.lower() in COMPRESSED:
        raise DataError(f"{path}: is compressed: unpack it first")


def _inside(folder: Path) -> list[Path]:
    """All files of a folder but hidden ones, sorted by path."""
    inside = [p for p in sorted(folder.rglob("*")) if not p.is_dir()]
    return [p for p in inside if not any(s[0] == "." for s in p.relative_to(folder).parts)]


def _stays_in(folder: Path, place: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def _check_regular(files: Sequence[Path]) -> None:
    for path in files:
        try:
            check_regular(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _saved_files(state: Path) -> list[Path]:
    """Return the files of a data set written by `save_to_disk`, without its caches."""
    try:
        listed = json.loads(read_text(state)).get("_data_files", [])
        files = [state.parent / Path(entry["filename"]).name for entry in listed]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    for path in files:
        if not path.exists():
            raise DataError(f"{path}: is missing, and {state} lists it: copy the whole folder")
    return files


def _missing_shards(files: Sequence[Path]) -> list[str]:
    groups: dict[tuple[Path, str, int], set[int]] = {}
    for path in files:
        if shard := _SHARD.search(path.stem):
            series = (path.parent, path.stem[: shard.start()], int(shard[2]))
            groups.setdefault(series, set()).add(int(shard[1]))
    return [
        f"warning: {parent / stem}: {len(found)} of {count} shards are there"
        for (parent, stem, count), found in groups.items()
        if len(found) < count
    ]
