"""A reference is named by its weights' content: not by path, layout or time; read once."""

from __future__ import annotations

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from modern_llm.config import ModernLLMConfig
from modern_llm.config.errors import StorageError
from modern_llm.models import pt_checkpoint
from modern_llm.models.build import build_model
from modern_llm.models.checkpoint_tensors import stored_tensors, weight_files
from modern_llm.models.load import inspect_checkpoint
from modern_llm.reference.weights_digest import digest_of, remembered_digest
from modern_llm.storage import file_digests as digests

SHAPES = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False},
    "experts": {"use_moe": True, "ffn_hidden_size": 32, "moe_config": {"num_experts": 4}},
}


def shape(**changes):
    fields = {"vocab_size": 300, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
    return ModernLLMConfig(**(fields | changes))


def digest_at(place) -> str:
    checkpoint = inspect_checkpoint(place)
    return digest_of(stored_tensors(checkpoint, weight_files(checkpoint)))


@pytest.mark.parametrize("name", SHAPES)
def test_one_file_several_files_and_a_pt_file_have_one_digest(tmp_path, name):
    config = shape(**SHAPES[name])
    model = build_model(config, seed=3)
    pt_checkpoint.save_model(tmp_path / "model.pt", config, model)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    wrapped = {f"module.{n}": t for n, t in model.state_dict().items()}
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    torch.save(content | {"model_state": wrapped}, tmp_path / "wrapped.pt")
    places = ("model.pt", "whole", "parts", "wrapped.pt")
    assert len({digest_at(tmp_path / place) for place in places}) == 1


def test_one_bit_a_name_a_shape_and_a_type_count(tmp_path):
    build_model(shape(tie_embeddings=False), seed=3).save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    seen = {digest_at(tmp_path / "a")}

    def other(name, tensors):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        seen.add(digest_at(tmp_path / name))

    norm = "model.norm.weight"
    flipped = weights[norm].clone()
    flipped.view(torch.int32)[5] ^= 1
    other("bit", weights | {norm: flipped})
    other("shape", weights | {norm: weights[norm].reshape(2, -1)})
    other("type", {name: tensor.bfloat16() for name, tensor in weights.items()})
    renamed = dict(weights)
    renamed["model.other.weight"] = renamed.pop(norm)
    other("name", renamed)
    assert len(seen) == 5
    # The same again under another path, at another time and in another order is the same.
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (1, 1))
    assert digest_at(tmp_path / "copy") in seen and len(seen) == 5


def test_scalars_and_empty_tensors_count_too():
    zero = torch.zeros(())
    digests = {
        digest_of([("a", zero)]),
        digest_of([("a", zero + 1)]),
        digest_of([("a", torch.zeros(0, 3))]),
        digest_of([("a", torch.zeros(3, 0))]),
    }
    assert len(digests) == 4


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"first")
    old = time.time_ns() - 10**11
    os.utime(path, ns=(old, old))
    return path


def asked(path, memory, fingerprint="x"):
    """The digest, and how often the file was read for it."""
    reads = []

    def tensors():
        reads.append(1)
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        return [("a", content)]

    return remembered_digest([path], tensors, memory, fingerprint), len(reads)


def test_the_same_file_is_not_read_twice(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_S", 0.0)
    first, reads = asked(weights, tmp_path / "memory")
    assert reads == 1
    assert asked(weights, tmp_path / "memory") == (first, 0)
    assert asked(weights, tmp_path / "memory", fingerprint="tied")[1] == 1


def test_other_weights_at_the_same_path_are_read(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_S", 0.0)
    first, _ = asked(weights, tmp_path / "memory")
    state = weights.stat()
    weights.write_bytes(b"other")  # as long, and with the time put back
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    second, reads = asked(weights, tmp_path / "memory")
    assert second != first and reads == 1


def test_files_that_are_still_warm_are_read_again(tmp_path, weights):
    asked(weights, tmp_path / "memory")  # its inode is some milliseconds old
    assert asked(weights, tmp_path / "memory")[1] == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, weights):
    def tensors():
        weights.write_bytes(b"changed under our hands")
        return [("a", torch.zeros(1))]

    with pytest.raises(StorageError, match="changed while it was read"):
        remembered_digest([weights], tensors, tmp_path / "memory", "x")


def test_a_memory_that_is_broken_or_cannot_be_written_costs_a_reading(
    tmp_path, weights, monkeypatch
):
    monkeypatch.setattr(digests, "SETTLED_S", 0.0)
    memory = tmp_path / "memory"
    first, _ = asked(weights, memory)
    (entry,) = memory.iterdir()
    for broken in ("", "[]", "{}", '{"version": 1}', entry.read_text()[:-20]):
        entry.write_text(broken)
        assert asked(weights, memory) == (first, 1)
    (tmp_path / "file").write_text("")
    assert asked(weights, tmp_path / "file" / "memory") == (first, 1)
