"""A tiny tokenizer, checkpoint and data set for whole runs."""

from __future__ import annotations

import pytest

from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", transcripts(30))
