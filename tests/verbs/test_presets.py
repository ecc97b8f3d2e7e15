"""`presets`: what is listed is what is there; copies are whole and replace nothing."""

from __future__ import annotations

import json

import pytest

from modern_llm.cli import main
from modern_llm.storage import fault_points
from modern_llm.verbs import presets


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Presets made up for the purpose, where the package would have them."""
    folder = tmp_path / "package"
    for name in presets.FOLDERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.yaml").write_text(f"of: {name}\n")
    monkeypatch.setattr(presets, "presets_root", lambda: folder)
    return folder


def test_they_are_listed_and_copied(root, tmp_path, capsys):
    assert main(["presets", "--json"]) == 0
    names = json.loads(capsys.readouterr().out.splitlines()[-1])["presets"]
    assert names == ["accelerate_configs/a.yaml", "ds_configs/a.yaml"]
    target = tmp_path / "new" / "mine"
    assert main(["presets", "--copy", str(target)]) == 0
    for name in names:
        assert (target / name).read_bytes() == (root / name).read_bytes()
    assert main(["presets", "--copy", str(target)]) == 0  # the same again changes nothing


def test_what_was_edited_is_not_replaced(root, tmp_path, capsys):
    target = tmp_path / "mine"
    assert main(["presets", "--copy", str(target)]) == 0
    (target / "ds_configs" / "a.yaml").write_text("mine")
    (target / "accelerate_configs" / "a.yaml").unlink()
    assert main(["presets", "--copy", str(target)]) == 2
    assert "ds_configs/a.yaml stand there with other content" in capsys.readouterr().err
    assert not (target / "accelerate_configs" / "a.yaml").exists()  # all or nothing


def test_a_place_that_cannot_be_written_is_status_3(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["presets", "--copy", str(tmp_path / "file" / "x")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_a_disk_that_refuses_leaves_no_half_of_a_file(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fault_points, "_reached", {})
    monkeypatch.setenv(fault_points.VARIABLE, "preset.copy.after:0:2:enospc")
    target = tmp_path / "mine"
    assert main(["presets", "--copy", str(target)]) == 3
    assert "No space left" in capsys.readouterr().err
    files = [path for path in target.rglob("*") if path.is_file()]
    assert files == [target / "accelerate_configs" / "a.yaml"]
    assert files[0].read_bytes() == (root / "accelerate_configs" / "a.yaml").read_bytes()
