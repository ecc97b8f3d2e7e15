"""Inputs of a configuration that nodes compare: all options that name files, and no other text."""

from __future__ import annotations

import dataclasses
import os
import socket
from pathlib import Path
from types import ModuleType

import pytest

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError, PeerError
from modern_llm.distributed.rendezvous import handshake
from modern_llm.distributed.rendezvous.input_files import INPUTS, bytes_in, named_in
from modern_llm.distributed.runtime import start
from modern_llm.storage import file_digests
from tests.helpers.ranks import run_ranks

SECTIONS = (
    DocumentDatasetConfig, InstructionDatasetConfig, LoraConfig, ModernLLMConfig,
    PreferenceDatasetConfig, TrainingConfig, DPOConfig,
)  # fmt: skip


def test_only_inputs_count_even_if_a_text_looks_like_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data.jsonl", "out", "chat", "run"):
        Path(name).write_text(name)
    values = {
        "train": {"output_dir": "out", "run_name": "run", "dataset_name": "data.jsonl"},
        "data": {"template": "chat", "sources": [{"dataset_name": "data.jsonl", "weight": 1.0}]},
        "sft_checkpoint": "no/such/place",
    }
    assert list(named_in(values)) == ["data.jsonl"]
    assert bytes_in(values) == len("data.jsonl")


@pytest.mark.parametrize("text", ["x" * 5000, "{prompt} " * 120, "a/" * 2000, "nul\0", "", "."])
def test_any_text_in_a_configuration_is_accepted(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert set(named_in({"data": {"template": text, "dataset_name": text}})) <= {"."}


def test_every_option_that_names_files_is_declared():
    """A new option with which a run reads a file must be added to `INPUTS`, or listed here."""
    others = {
        "run_name", "output_dir", "template",  # outputs; text
        "subset", "split", "eval_split", "id_column", "messages_column", "text_column",
    }  # fmt: skip
    ends = ("_name", "_checkpoint", "_store", "_dir", "_file", "_path", "_folder")
    found = {
        field.name
        for section in SECTIONS
        for field in dataclasses.fields(section)
        if "Path" in str(field.type) or field.name.endswith(ends)
    }
    assert found <= INPUTS | others, found - INPUTS - others


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "SETTLED_S", 0.0)
    files = [tmp_path / name for name in ("a", "b", "c")]
    for path in files:
        path.write_text(path.name)
    reads: list[str] = []
    real = file_digests._read
    monkeypatch.setattr(
        file_digests, "_read", lambda path: (reads.append(path.name), real(path))[1]
    )

    def look() -> tuple[list[str], list[str]]:
        reads.clear()
        return file_digests.file_digests(files, tmp_path / "memory"), list(reads)

    first, read = look()
    assert read == ["a", "b", "c"] and len(set(first)) == 3
    assert look() == (first, [])
    state = files[1].stat()
    files[1].write_text("B")
    os.utime(files[1], ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time unchanged
    second, read = look()
    assert read == ["b"] and second[1] != first[1] and second[::2] == first[::2]
    (place,) = (tmp_path / "memory").iterdir()
    place.write_text("[1")
    assert look() == (second, ["a", "b", "c"])
    monkeypatch.setattr(file_digests, "SETTLED_S", 3600.0)
    files[0].write_text("A")
    assert look()[1] == look()[1] == ["a"]  # too recent to be cached


def compared(folder: Path, others: Path) -> tuple[str, list[str]]:
    """Compare inputs as two nodes with one rank each, of which the second has other files.

    Returns:
        The errors, and the order in which ranks met and files were read.
    """
    rank = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": rank}
    os.environ["MODERN_LLM_CACHE"] = str(folder / f"cache{rank}")
    os.chdir(others if rank == "1" else folder)
    done: list[str] = []

    def noted(module: ModuleType, name: str) -> None:
        real = getattr(module, name)
        setattr(
            module, name, lambda *args, **options: (done.append(name), real(*args, **options))[1]
        )

    noted(handshake, "meet")
    noted(file_digests, "_read")
    config = TrainingConfig(run_name="x", output_dir=folder / f"out{rank}", dataset_name="p.jsonl")
    record = {"train": dataclasses.asdict(config) | {"output_dir": "same"}}
    try:
        start(config, record)
    except PeerError as error:
        return str(error), done
    return "", done


@pytest.mark.slow
def test_inputs_are_read_after_the_handshake_and_named_if_they_differ(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.jsonl").write_text("1\n")
    both = tmp_path / "a", tmp_path / "b"
    assert run_ranks(compared, 2, *both) == [("", ["meet", "_read"])] * 2
    (tmp_path / "b" / "p.jsonl").write_text("2\n")
    for refused, _ in run_ranks(compared, 2, *both):
        node = f"rank 1 (node 1, {socket.gethostname()})"
        assert f"{node} differs from rank 0 in its files" in refused
        assert "p.jsonl" in refused


def test_an_input_that_cannot_be_read_is_one_error_line(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    path.write_text("1\n")

    def refuse(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(file_digests, "_read", refuse)
    with pytest.raises(ConfigError, match=r"p.jsonl: cannot be read \(Input/output error\)"):
        named_in({"train": {"dataset_name": str(path)}})
