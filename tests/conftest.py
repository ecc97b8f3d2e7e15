"""What every test gets: no Hub, few threads, its own reference cache, the folder of real input.

The environment is set before any test module imports a library that reads it once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Torch takes its number of threads from here when it is first imported, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "2")


# The same examples in every run: a failure that comes and goes with a random seed proves nothing.
settings.register_profile("fixed", derandomize=True, database=None)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder of real data, tokenizers and reference vectors beside the repository."""
    folder = (request.config.rootpath / ".." / "shared").resolve()
    if not (folder / "golden").is_dir():
        pytest.skip(
            f"no real input: {folder} is not there (other tests cover the same on text of our own)"
        )
    return folder


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The folder of a real chat model of about 135M parameters, for tests marked `real_model`."""
    folder = os.environ.get("MODERN_LLM_REAL_MODEL")
    if not folder:
        pytest.skip("no real model: set MODERN_LLM_REAL_MODEL to a transformers folder of one")
    path = Path(folder)
    assert (path / "config.json").is_file(), f"MODERN_LLM_REAL_MODEL={folder} has no config.json"
    return path


@pytest.fixture(scope="session", autouse=True)
def no_real_reference_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures of a module run before those of a test: they must not find what real runs left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERN_LLM_CACHE", str(tmp_path_factory.mktemp("reference-cache")))
        yield


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for reference values that no other test and no real run has filled."""
    folder = tmp_path / "reference-cache"
    monkeypatch.setenv("MODERN_LLM_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A byte-level tokenizer of a few hundred tokens."""
    from tests.helpers.text import make_tokenizer

    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a tiny Llama for whole runs."""
    from tests.helpers.text import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory) -> Path:
    """A file of 30 preference pairs."""
    from tests.helpers.text import transcripts, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", transcripts(30))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; only such tests make this import torch."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
