"""A folder is complete or absent, independent of other writers and of leftovers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from modern_llm.config.errors import StorageError
from modern_llm.storage.atomic import new_folder


def put(folder: Path, content: str) -> None:
    with new_folder(folder) as new:
        assert not folder.exists() or (folder / "a").read_text() != content
        (new / "a").write_text(content)
        (new / "inner").mkdir()
        (new / "inner" / "b").write_text(content)


def test_the_folder_appears_at_the_end_and_replaces_an_older_one(tmp_path: Path):
    folder = tmp_path / "deep" / "t"
    for content in ("first", "second"):
        put(folder, content)
        assert (folder / "inner" / "b").read_text() == content
        assert [path.name for path in folder.parent.iterdir()] == ["t"]


def test_a_failure_leaves_the_older_one_or_nothing(tmp_path: Path):
    put(tmp_path / "t", "first")
    for folder in (tmp_path / "t", tmp_path / "x" / "y" / "t"):
        with pytest.raises(ValueError, match="oh"), new_folder(folder) as new:
            (new / "a").write_text("half")
            raise ValueError("oh")
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t" / "a").read_text() == "first"


def test_one_that_another_machine_has_put_there_stays(tmp_path: Path):
    put(tmp_path / "t", "old")
    with new_folder(tmp_path / "t") as new:
        (new / "a").write_text("mine")
        (tmp_path / "t").rename(tmp_path / "elsewhere")
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "a").write_text("theirs")
    assert (tmp_path / "t" / "a").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "t"]


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    host = socket.gethostname()
    dead, dead_old = f"t.tmp-{host}-{child.pid}", f"t.tmp-{host}-{child.pid}-old"
    kept = [f"t.tmp-{host}-{os.getppid()}", f"t.tmp-{host}-other-1", "t.tmp-far-1", f"u{dead}"]
    for name in (dead, dead_old, *kept):
        (tmp_path / name).mkdir()
    put(tmp_path / "t", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "t"])


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    place = tmp_path / "file" / "t"
    with pytest.raises(StorageError, match="cannot write .*file"), new_folder(place):
        pytest.fail("entered")
