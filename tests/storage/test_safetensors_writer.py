"""A written file equals the one of safetensors, and its digest is that of its bytes."""

from __future__ import annotations

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modern_llm.config.errors import NotFiniteError, StorageError
from modern_llm.storage import atomic, fault_points, safetensors_writer
from modern_llm.storage.safetensors_writer import NAMES, write_tensors


def mixed() -> dict[str, torch.Tensor]:
    return {
        "z.weight": torch.randn(3, 5),
        'ä "b"': torch.tensor(2.5),
        "half": torch.randn(7).to(torch.bfloat16),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "a.weight": torch.randn(2, 2),
    }


@pytest.mark.parametrize("group", [safetensors_writer.GROUP, 16])
@pytest.mark.parametrize("metadata", [{}, {"starts": '{"a": 1}'}])
def test_the_bytes_are_those_of_safetensors(tmp_path, monkeypatch, metadata, group):
    monkeypatch.setattr(safetensors_writer, "GROUP", group)  # in one group, and in several
    tensors = mixed()
    write_tensors(tmp_path / "ours", tensors, metadata)
    save_file(tensors, tmp_path / "theirs", metadata=metadata or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = load_file(tmp_path / "ours")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert (file.metadata() or {}) == metadata


def test_a_file_without_tensors_is_one(tmp_path):
    write_tensors(tmp_path / "empty", {}, {"starts": "{}"})
    assert load_file(tmp_path / "empty") == {}


def test_a_flush_that_fails_in_the_middle_of_a_file_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "GROUP", 16)
    real, seen = safetensors_writer.flush_file, []

    def flush(path):
        seen.append(path)
        if len(seen) == 2:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(safetensors_writer, "flush_file", flush)
    with pytest.raises(StorageError, match="Input/output"):
        with atomic.committed_folder(tmp_path / "c") as place:
            write_tensors(place / "one", mixed(), {})
    assert len(seen) > 2 and not list(tmp_path.iterdir())


def test_every_dtype_of_the_table_is_read_back(tmp_path):
    for name in NAMES:
        tensor = torch.zeros(3, dtype=getattr(torch, name))
        write_tensors(tmp_path / name, {"t": tensor}, {})
        assert load_file(tmp_path / name)["t"].dtype == tensor.dtype, name


def test_the_digest_is_that_of_the_file_and_is_not_made_twice(tmp_path, monkeypatch):
    read = []
    real = atomic.digest_file
    monkeypatch.setattr(
        atomic, "digest_file", lambda path, *v: read.append(path.name) or real(path, *v)
    )
    with atomic.committed_folder(tmp_path / "c", {"step": 1}) as place:
        write_tensors(place / "model.safetensors", mixed(), {})
        (place / "other.json").write_text("{}")
    assert read == ["other.json"]
    assert atomic.verified_manifest(tmp_path / "c") == {"step": 1}
    content = (tmp_path / "c" / "model.safetensors").read_bytes()
    assert xxhash.xxh3_128(content).hexdigest() in (tmp_path / "c" / "MANIFEST.json").read_text()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_and_named(tmp_path, bad):
    tensors = {"good": torch.ones(4), "bad": torch.tensor([1.0, bad, 2.0])}
    with pytest.raises(NotFiniteError, match="bad: holds values that are not finite"):
        with atomic.committed_folder(tmp_path / "c") as place:
            write_tensors(place / "t", tensors, {})
    assert not list(tmp_path.iterdir())
    both = torch.tensor([float("inf"), -float("inf")])
    with pytest.raises(NotFiniteError):
        write_tensors(tmp_path / "t", {"both": both}, {})
    # A sum that overflows does not make a value non-finite.
    most = torch.full((4,), torch.finfo(torch.float32).max)
    write_tensors(tmp_path / "t", {"most": most, "ids": torch.arange(3)}, {})
    assert torch.equal(load_file(tmp_path / "t")["most"], most)


def test_a_refused_write_leaves_no_note_of_a_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(fault_points, "_reached", {})
    monkeypatch.setattr(atomic, "_noted", {})
    monkeypatch.setenv(fault_points.VARIABLE, "file.flush.after:0:2:enospc")
    with pytest.raises(StorageError, match="cannot write"):
        with atomic.committed_folder(tmp_path / "c") as place:
            write_tensors(place / "one", mixed(), {})
            write_tensors(place / "two", mixed(), {})
    assert atomic._noted == {} and not list(tmp_path.iterdir())
