"""A committed folder is complete or absent, and every changed byte of it is detected."""

from __future__ import annotations

import hashlib
import json

import pytest
import xxhash

from modern_llm.config.errors import StorageError
from modern_llm.storage import atomic


def write(target, **files):
    with atomic.committed_folder(target, {"step": 3}) as place:
        (place / "sub").mkdir()
        for name, text in files.items():
            (place / "sub" / name).write_text(text)


def test_a_folder_appears_whole_with_its_facts(tmp_path):
    write(tmp_path / "a", one="1", two="22")
    assert atomic.verified_manifest(tmp_path / "a") == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_manifests_of_the_first_version_are_read_and_believed(tmp_path):
    """They contain SHA-256 digests and were written by earlier releases."""
    write(tmp_path / "a", one="1")
    path = tmp_path / "a" / atomic.MANIFEST
    new = json.loads(path.read_text())
    assert new["version"] == 2
    assert new["files"]["sub/one"] == {"size": 1, "xxh3_128": xxhash.xxh3_128(b"1").hexdigest()}
    old = {
        "version": 1,
        "facts": {"step": 3},
        "files": {"sub/one": {"size": 1, "sha256": hashlib.sha256(b"1").hexdigest()}},
    }
    old["own"] = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(old))
    assert atomic.verified_manifest(tmp_path / "a") == {"step": 3}
    (tmp_path / "a" / "sub" / "one").write_text("2")
    with pytest.raises(StorageError, match="size or sha256 differs"):
        atomic.verified_manifest(tmp_path / "a")


@pytest.mark.parametrize("version", [0, 3, "2", True, None, [2]])
def test_a_manifest_of_another_version_is_refused(tmp_path, version):
    write(tmp_path / "a", one="1")
    path = tmp_path / "a" / atomic.MANIFEST
    manifest = json.loads(path.read_text()) | {"version": version}
    manifest["own"] = atomic._own_digest(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="manifest"):
        atomic.verified_manifest(tmp_path / "a")


def test_an_error_keeps_the_previous_folder_and_nothing_else(tmp_path):
    write(tmp_path / "a", one="1")
    with pytest.raises(KeyError), atomic.committed_folder(tmp_path / "a") as place:
        (place / "new").write_text("x")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "sub" / "one").read_text() == "1"


def test_a_folder_is_replaced(tmp_path):
    write(tmp_path / "a", one="1")
    write(tmp_path / "a", two="2")
    assert not (tmp_path / "a" / "sub" / "one").exists()
    assert atomic.verified_manifest(tmp_path / "a")


def test_a_failed_write_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file" / "a", one="1")
    with pytest.raises(StorageError, match="cannot write"):
        atomic.write_file(tmp_path / "file" / "b", "text")


def test_every_flipped_byte_and_truncation_of_every_file_is_noticed(tmp_path):
    write(tmp_path / "a", one="some text")
    for path in [tmp_path / "a" / atomic.MANIFEST, tmp_path / "a" / "sub" / "one"]:
        intact = path.read_bytes()
        damaged = [intact[:n] for n in range(len(intact))]
        for at in range(len(intact)):
            flipped = bytearray(intact)
            flipped[at] ^= 1 << (at % 8)
            damaged.append(bytes(flipped))
        noticed = 0
        for content in damaged:
            path.write_bytes(content)
            try:
                facts = atomic.verified_manifest(tmp_path / "a")
            except StorageError:
                noticed += 1
            else:
                # White space between JSON values has no meaning.
                assert facts == {"step": 3} and path.name == atomic.MANIFEST
        assert noticed > 0.9 * len(damaged)
        path.write_bytes(intact)


@pytest.mark.parametrize("change", ["missing", "extra", "link"])
def test_missing_extra_and_linked_files_are_refused(tmp_path, change):
    write(tmp_path / "a", one="1")
    path = tmp_path / "a" / "sub" / "one"
    if change == "extra":
        (tmp_path / "a" / "other").write_text("")
    else:
        path.unlink()
    if change == "link":
        (tmp_path / "elsewhere").write_text("1")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        atomic.verified_manifest(tmp_path / "a")
