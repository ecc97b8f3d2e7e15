"""A tiny checkpoint with its pairs, and a configuration of a run on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """`model`, `tokenizer` and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("verbs")
    make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    write_jsonl(folder / "pairs.jsonl", transcripts(60))
    return folder


@pytest.fixture
def run_file(place, tmp_path):
    """Write the configuration of a small DPO run; keyword arguments change its sections."""

    def write(**changes) -> Path:
        run = {
            "sft_checkpoint": str(place / "model"),
            "train": {
                "run_name": "a", "output_dir": str(tmp_path / "out"), "batch_size": 8,
                "max_steps": 3, "log_every": 1, "learning_rate": 1e-3,
            },
            "dpo": {"max_length": 96},
            "data": {"dataset_name": str(place / "pairs.jsonl")},
        }  # fmt: skip
        for name, values in changes.items():
            run[name] = run[name] | values if isinstance(run.get(name), dict) else values
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(run))
        return file

    return write
