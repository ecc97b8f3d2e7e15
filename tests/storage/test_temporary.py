"""Temporary folders are removed at every end of a process: leaving the block, or the watchdog."""

from __future__ import annotations

import tempfile

import pytest

from modern_llm.storage import temporary


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(temporary, "_folders", {})


def test_a_folder_goes_with_its_block_and_with_an_error(tmp_path):
    with pytest.raises(ValueError), temporary.temporary_folder("score") as folder:
        (folder / "x").write_text("x")
        raise ValueError
    assert list(tmp_path.iterdir()) == [] and not temporary._folders


def test_what_is_remembered_is_removed_at_a_hard_end_and_what_is_forgotten_stays(tmp_path):
    for name in ("mine", "of_another"):
        (tmp_path / name / "data").mkdir(parents=True)
        temporary.remember(tmp_path / name)
    temporary.remember(tmp_path / "never made")
    temporary.forget(tmp_path / "of_another")
    temporary.remove_all()
    assert [path.name for path in tmp_path.iterdir()] == ["of_another"]
