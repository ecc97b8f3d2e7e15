"""Digests of the local input files of a configuration, to compare them between nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from modern_llm.config.errors import ConfigError
from modern_llm.storage.file_digests import file_digests
from modern_llm.storage.regular_files import open_regular, read_text
from modern_llm.storage.untrusted import LARGEST_YAML, parse_yaml

# Of larger files only the size and both ends are compared; tokenised data and reference weights are
# compared completely later.
WHOLE_BYTES = 256 << 20
END_BYTES = 8 << 20
INPUTS = frozenset(
    {
        "dataset_name", "eval_dataset_name", "tokenizer_name", "sft_checkpoint",
        "pretrain_checkpoint", "reference_checkpoint", "reference_store",
    }
)  # fmt: skip
"""Options that name inputs. Other values may look like paths, but are outputs or text."""


def content_of(config: Path) -> tuple[str, Any]:
    """Return the digest of a configuration file and its values.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = read_text(config, LARGEST_YAML)
        content = parse_yaml(text)[0]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"--config {config}: cannot be read ({error})"]) from error
    return hashlib.sha256(text.encode()).hexdigest(), content


def named_in(values: Any) -> dict[str, str]:
    """Return the digest of every local file or folder that an input option in `values` names.

    Raises:
        ConfigError: one cannot be read.
    """
    found = {}
    for name in _inputs(values):
        try:
            found[name] = _digest(Path(name))
        except OSError as error:
            raise ConfigError(
                [f"{error.filename or name}: cannot be read ({error.strerror or error})"]
            ) from error
    return found


def bytes_in(values: Any) -> int:
    """Return the maximum number of bytes that `named_in` reads."""
    sizes = (file.stat().st_size for name in _inputs(values) for file in _files(Path(name)))
    return sum(size if size <= WHOLE_BYTES else 2 * END_BYTES for size in sizes)


def _inputs(values: Any) -> list[str]:
    return sorted({name for name in _names(values) if _is_local(name)})


def _names(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            if isinstance(value, str | Path):
                if key in INPUTS:
                    yield str(value)
            else:
                yield from _names(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _names(value)


def _is_local(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):  # too long for a file name, or with a null byte
        return False


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = _files(path)
    sizes = {file: file.stat().st_size for file in files}
    whole = [file for file in files if sizes[file] <= WHOLE_BYTES]
    known = dict(zip(whole, file_digests(whole), strict=True))
    for file in files:
        # Relative names: the path of an input may differ between nodes, its content may not.
        digest.update(f"{file.relative_to(path)}:{sizes[file]}\n".encode())
        digest.update(known[file].encode() if file in known else _ends(file))
    return digest.hexdigest()


def _ends(file: Path) -> bytes:
    with open_regular(file) as stream:
        first = stream.read(END_BYTES)
        stream.seek(-END_BYTES, 2)
        return first + stream.read(END_BYTES)
