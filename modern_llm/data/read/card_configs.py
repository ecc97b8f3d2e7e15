"""The splits that a data set's own README.md names, as the Hub reads them.

The front matter of the file may hold `configs`: for each configuration the files of each split, as
patterns relative to the folder. Patterns are matched against the files that are in the folder, so
that none can name a file elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from modern_llm.config.errors import DataError
from modern_llm.storage.regular_files import open_regular
from modern_llm.storage.untrusted import LARGEST_YAML, YAMLError, parse_yaml

CARD = "README.md"
_RULE = b"---"
_LONGEST_PATTERN, _MOST_PATTERNS = 500, 1000


@dataclass(frozen=True)
class CardConfig:
    """One configuration.

    Attributes:
        folder: where its patterns begin, relative to the folder of the data set.
        splits: split -> its patterns; None where the names of the files tell.
    """

    name: str
    default: bool
    folder: PurePosixPath
    splits: dict[str, list[str]] | None


def card_configs(folder: Path) -> list[CardConfig]:
    """Return the configurations that the README.md of a folder names, none where it names none.

    Raises:
        DataError: the front matter cannot be read, or a configuration is not as the Hub has it.
    """
    path = folder / CARD
    try:
        text = _front_matter(path)
        found = parse_yaml(text)[0] if text else None
    except (OSError, ValueError, YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: its front matter cannot be read ({reason}): repair it, or remove the file"
        ) from error
    listed = found.get("configs") if isinstance(found, dict) else None
    if listed is None:
        return []
    if not isinstance(listed, list):
        raise _odd(path, "'configs' is no list")
    configs = [_config(path, number, entry) for number, entry in enumerate(listed)]
    names = [config.name for config in configs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _odd(path, f"two configs are named {twice[:60]!r}")
    return configs


def choose_config(
    folder: Path, configs: Sequence[CardConfig], subset: str | None
) -> CardConfig | None:
    """Return the selected configuration, None if the README.md names none.

    Without a name it is the only one, or the one that the file marks as the default.

    Raises:
        DataError: there is none of that name, or a choice is left.
    """
    names = ", ".join(config.name for config in configs)
    if subset is not None:
        chosen = [config for config in configs if config.name == subset]
        if not configs:
            raise DataError(f"{folder}: is local and has no subsets: leave out subset {subset!r}")
        if not chosen:
            raise DataError(f"{folder}: has no subset {subset!r}, only {names}: choose one of them")
        return chosen[0]
    if len(configs) > 1:
        chosen = [c for c in configs if c.default] or [c for c in configs if c.name == "default"]
        if len(chosen) != 1:
            raise DataError(
                f"{folder}: has several subsets: {names}: choose one (subset: {configs[0].name})"
            )
        return chosen[0]
    return configs[0] if configs else None


def matching(files: Sequence[PurePosixPath], patterns: Sequence[str]) -> set[PurePosixPath]:
    """Return the paths that match one of the patterns; `**` matches any folders."""
    parts = [PurePosixPath(pattern).parts for pattern in patterns]
    return {file for file in files if any(_fits(file.parts, pattern) for pattern in parts)}


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    # Of the beginnings of the path, those that the pattern so far fits.
    reached = {0}
    for part in pattern:
        if part == "**":
            reached = set(range(min(reached), len(path) + 1)) if reached else set()
        else:
            at = (i for i in reached if i < len(path) and fnmatchcase(path[i], part))
            reached = {i + 1 for i in at}
    return len(path) in reached


def _front_matter(path: Path) -> str:
    """The YAML between two rules at the start of the file, an empty text where there is none."""
    try:
        with open_regular(path) as file:
            if file.readline(len(_RULE) + 2).rstrip() != _RULE:
                return ""
            head = file.read(LARGEST_YAML + 1)
    except FileNotFoundError:
        return ""
    lines = head.splitlines(keepends=True)
    end = next((at for at, line in enumerate(lines) if line.rstrip() == _RULE), None)
    if end is None:
        if len(head) > LARGEST_YAML:
            raise ValueError(f"has more than {LARGEST_YAML:,} bytes")
        return ""
    return b"".join(lines[:end]).decode("utf-8")


def _config(path: Path, number: int, entry: Any) -> CardConfig:
    place = f"configs[{number}]"
    if not isinstance(entry, dict):
        raise _odd(path, f"{place} is no object")
    name = entry.get("config_name", "default")
    if not isinstance(name, str) or not name:
        raise _odd(path, f"{place} has a config_name that is no text")
    given = entry.get("data_files")
    folder = entry.get("data_dir") or "."
    _check_pattern(path, f"{place}, data_dir", folder)
    splits = None if given is None else _splits(path, f"{place} ({name[:60]!r})", given)
    return CardConfig(name, entry.get("default") is True, PurePosixPath(folder), splits)


def _splits(path: Path, place: str, given: Any) -> dict[str, list[str]]:
    """Split -> patterns. Files without a split are those of `train`."""
    if isinstance(given, dict):
        pairs = list(given.items())
    elif isinstance(given, list) and any(isinstance(entry, dict) for entry in given):
        if not all(isinstance(e, dict) and {"split", "path"} <= e.keys() for e in given):
            raise _odd(path, f"{place}: data_files holds an entry without 'split' or 'path'")
        pairs = [(entry["split"], entry["path"]) for entry in given]
    else:
        pairs = [("train", given)]
    splits: dict[str, list[str]] = {}
    for split, patterns in pairs:
        if not isinstance(split, str) or not split:
            raise _odd(path, f"{place}: a split has a name that is no text")
        patterns = patterns if isinstance(patterns, list) else [patterns]
        for pattern in patterns:
            _check_pattern(path, f"{place}, split {split[:60]!r}", pattern)
        splits.setdefault(split, []).extend(patterns)
    if not splits or not all(splits.values()) or sum(map(len, splits.values())) > _MOST_PATTERNS:
        raise _odd(path, f"{place}: data_files names no file, or more than {_MOST_PATTERNS}")
    return splits


def _check_pattern(path: Path, place: str, pattern: Any) -> None:
    if not isinstance(pattern, str) or not pattern or len(pattern) > _LONGEST_PATTERN:
        raise _odd(path, f"{place}: a path is no text of at most {_LONGEST_PATTERN} characters")
    pure = PurePosixPath(pattern)
    if pure.is_absolute() or ".." in pure.parts or "://" in pattern or pattern.startswith("~"):
        raise _odd(path, f"{place}: {pattern[:60]!r} leaves the folder")


def _odd(path: Path, what: str) -> DataError:
    return DataError(f"{path}: {what}: repair it, or remove the file")
