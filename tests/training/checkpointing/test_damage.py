"""A checkpoint with any changed byte, or cut to any length, is refused before it is used."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modern_llm.config import ModernLLMConfig, TrainingConfig
from modern_llm.config.errors import StorageError
from modern_llm.distributed.runtime import start
from modern_llm.models.build import build_model
from modern_llm.models.run_checkpoint import load_weights
from modern_llm.storage.atomic import MANIFEST, committed_folder, verified_manifest
from modern_llm.training.checkpointing import format
from modern_llm.training.guards.state import GuardState


def made(folder: Path):
    """A very small model, and a runtime for it."""
    runtime = start(TrainingConfig(run_name="d", output_dir=folder))
    shape = ModernLLMConfig(
        vocab_size=16, d_model=4, n_layers=1, n_heads=1, ffn_hidden_size=4, max_seq_len=8,
        tie_embeddings=False,
    )  # fmt: skip
    return runtime, nn.ModuleDict({"model": build_model(shape, seed=0)})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with the checkpoints of steps 1 and 2 of a very small model."""
    folder = tmp_path_factory.mktemp("run")
    runtime, model = made(folder)
    engine = runtime.prepare(model, torch.optim.AdamW(model.parameters()))
    place = folder / "checkpoints"
    place.mkdir()
    for step in (1, 2):
        engine.inner(torch.arange(8)[None]).logits.square().sum().backward()
        engine.optimizer.step()
        format.save(runtime, place, step, engine, GuardState(), {"data": "x" * 40}, {})
    return place


def refused(folder: Path, file: Path, content: bytes) -> None:
    """Write other content to a file: the folder is refused with one line that names the file."""
    file.write_bytes(content)
    with pytest.raises(StorageError) as caught:
        verified_manifest(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_changed_byte_and_every_length_is_refused(checkpoints):
    place = checkpoints / "step-00000002"
    facts = verified_manifest(place)
    files = sorted(place.iterdir())
    assert [file.name for file in files] == [
        MANIFEST, "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    for file in files:
        intact = file.read_bytes()
        changed = bytearray(intact)
        for at in range(len(intact)):
            changed[at] = intact[at] ^ (1 << at % 8)
            refused(place, file, bytes(changed))
            changed[at] = intact[at]
        for length in range(len(intact)):
            refused(place, file, intact[:length])
        refused(place, file, intact + b"0")
        # The run resumes from the previous checkpoint, and says why; without one it does not start
        # over.
        assert format.newest(checkpoints)[0].name == "step-00000001"
        file.write_bytes(intact)
    assert verified_manifest(place) == facts
    assert format.newest(checkpoints)[0] == place


def test_a_checkpoint_that_the_disk_cannot_read_is_skipped(checkpoints, monkeypatch, caplog):
    real = Path.stat

    def fails(self, **options):
        if self.parent.name == "step-00000002" and self.name == "model.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", fails)
    assert format.newest(checkpoints)[0].name == "step-00000001"
    assert "step-00000002 is damaged and skipped: [Errno 5]" in caplog.text


@pytest.mark.parametrize(
    ("file", "name", "change", "found"),
    [
        ("model", "model.norm.weight", lambda t: t.double(), r"is F64 \(4,\), expected F32"),
        ("model", "model.norm.weight", lambda t: t[:, None], r"is F32 \(4, 1\), .* F32 \(4,\)"),
        ("model", "lm_head.weight", lambda t: t.T, r"is F32 \(4, 16\), expected F32 \(16, 4\)"),
        ("model", "lm_head.weight", lambda t: t.half(), r"is F16 \(16, 4\), expected F32"),
        ("optimizer", "exp_avg/lm_head.weight", lambda t: t.T, r"is F32 \(4, 16\), expected"),
        ("optimizer", "exp_avg/lm_head.weight", lambda t: t.double(), r"is F64 \(16, 4\)"),
        ("optimizer", "step/lm_head.weight", lambda t: t.double(), r"is F64 \(\), expected F32"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(
    checkpoints, tmp_path, file, name, change, found
):
    place = tmp_path / "step-00000001"
    shutil.copytree(checkpoints / "step-00000001", place)
    path = place / f"{file}.safetensors"
    tensors = load_file(path)
    assert name in tensors, tensors.keys()
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, {"starts": "{}"})
    runtime, model = made(tmp_path)
    with pytest.raises(StorageError, match=rf"{name} {found}"):
        load_weights(place, model["model"])
        engine = runtime.prepare(model, torch.optim.AdamW(model.parameters()))
        format.load_state(place, engine, GuardState())


def test_a_run_without_an_intact_checkpoint_does_not_start_over(checkpoints):
    kept = {}
    for place in checkpoints.iterdir():
        kept[place / MANIFEST] = (place / MANIFEST).read_bytes()
        (place / MANIFEST).write_bytes(b"{}")
    with pytest.raises(StorageError, match="none of 2 checkpoints is intact"):
        format.newest(checkpoints)
    for path, content in kept.items():
        path.write_bytes(content)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_changed_bits_in_50_mb(tmp_path):
    size, rng = 50_000_000, random.Random(5)
    with committed_folder(tmp_path / "big", {"step": 1}) as place:
        format.write_tensors(
            place / "model.safetensors", {"w": torch.randn(size // 4)}, {"starts": "{}"}
        )
    file = tmp_path / "big" / "model.safetensors"
    with file.open("r+b") as raw:
        for _ in range(10_000):
            at, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
            (before,) = os.pread(raw.fileno(), 1, at)
            os.pwrite(raw.fileno(), bytes([before ^ (1 << bit)]), at)
            with pytest.raises(StorageError, match="not the bytes that were written"):
                verified_manifest(tmp_path / "big")
            os.pwrite(raw.fileno(), bytes([before]), at)
    assert verified_manifest(tmp_path / "big") == {"step": 1}
