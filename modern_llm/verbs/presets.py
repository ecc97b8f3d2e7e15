"""The verb `presets`: the configurations of `accelerate launch` and DeepSpeed that come along."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.printable import one_line
from modern_llm.storage.atomic import new_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.regular_files import read_bytes
from modern_llm.verbs.settings import Settings

FOLDERS = ("accelerate_configs", "ds_configs")


class PresetsSettings(Settings):
    """List the launch presets (accelerate_configs, ds_configs), or copy them into a folder."""

    example: ClassVar[str] = "modern-llm presets --copy presets"

    copy_to: Path | None = None
    """Folder that gets accelerate_configs/ and ds_configs/; existing files that differ are
    refused."""


def presets_root() -> Path:
    """Return where the presets are: inside the installed package, else beside it in a checkout.

    Raises:
        UserError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "presets", package.parent):
        if all((place / folder).is_dir() for folder in FOLDERS):
            return place
    raise UserError(f"{package}: the presets are missing; install modern-llm again")


def presets(settings: PresetsSettings) -> dict[str, Any]:
    """List or copy."""
    root = presets_root()
    names = [
        str(file.relative_to(root))
        for folder in FOLDERS
        for file in sorted((root / folder).rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    if settings.copy_to is not None:
        _copy(root, names, settings.copy_to)
    if not settings.json_output:
        for name in names:
            print(one_line(settings.copy_to / name if settings.copy_to else name))
    return {"root": str(root), "presets": names, "copied_to": str(settings.copy_to or "")}


def _copy(root: Path, names: list[str], target: Path) -> None:
    for path in sorted({target / folder for folder in FOLDERS} | {target / n for n in names}):
        if path.is_symlink() or (path.exists() and path.is_dir() != (path.name in FOLDERS)):
            kind = "is a symbolic link" if path.is_symlink() else "is in the way"
            raise UserError(
                f"copy {target}: {path.relative_to(target)} {kind}: remove it or name another "
                "folder"
            )
    changed = [
        name
        for name in names
        if (target / name).exists() and read_bytes(target / name) != read_bytes(root / name)
    ]
    if changed:
        raise UserError(
            f"copy {target}: {', '.join(changed)} stand there with other content: "
            "remove them or name another folder"
        )
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with new_file(target / name) as place, around("preset.copy"):
                shutil.copyfile(root / name, place)
    except OSError as error:
        raise StorageError(
            f"copy {target}: cannot be written ({error.strerror or error}); name another folder"
        ) from error
