"""Digests of the local files that a configuration names, to compare them between nodes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from modern_llm.config.errors import ConfigError

# Of a larger file only its size and both ends are read, because nodes meet within a minute; the
# tokenised data and the reference's weights are compared whole, later.
WHOLE_BYTES = 256 << 20
END_BYTES = 8 << 20
# Written by the run, and different on every node that has a disk of its own.
NOT_READ = frozenset({"output_dir", "output"})


def digests_of(config: Path) -> dict[str, str]:
    """Return the digest of a configuration file and of every local file that it names.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = config.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"--config {config}: cannot be read ({error})"]) from error
    return {config.name: hashlib.sha256(text.encode()).hexdigest(), **named_in(content)}


def named_in(values: Any) -> dict[str, str]:
    """Return the digest of every local file or folder that stands among nested values."""
    return {name: _digest(Path(name)) for name in sorted(set(_names(values)))}


def _names(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            if key not in NOT_READ:
                yield from _names(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _names(value)
    elif isinstance(values, str) and 0 < len(values) < 1024 and "\n" not in values:
        if Path(values).exists():
            yield values


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        size = file.stat().st_size
        # A path of its own may differ between nodes; what stands below a named folder may not.
        digest.update(f"{file.relative_to(path)}:{size}\n".encode())
        with file.open("rb") as stream:
            if size <= WHOLE_BYTES:
                while block := stream.read(1 << 22):
                    digest.update(block)
                continue
            digest.update(stream.read(END_BYTES))
            stream.seek(-END_BYTES, 2)
            digest.update(stream.read(END_BYTES))
    return digest.hexdigest()
