"""DPO on a stream of pairs: the reference pass goes window by window."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.config import LoraConfig, PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import StorageError
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.order import Budget, Order, Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.batch.windowed import leave_out_of_steps
from modern_llm.reference import reference_pass
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.models import random_pairs
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

BATCH, WINDOW, STEPS, ROWS = 4, 12, 14, 33
"""Windows of three steps; the third has nine pairs, then the data begins again."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("stream")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    return SimpleNamespace(
        model=checkpoint, data=write_jsonl(folder / "rows.jsonl", transcripts(ROWS))
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(files, folder: Path, *, window: int | None = WINDOW, lora=None, data=None, **changes: Any):
    """Train, and return the losses."""
    train = {
        "run_name": "x", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": 1e-3, "log_every": 1, "tokens_per_micro_batch": 300, "save_every": 2,
    }  # fmt: skip
    options = {} if window is None else {"streaming": True, "streaming_window": window}
    options |= {"dataset_name": str(files.data)} | (data or {})
    dpo = {"max_length": 96, "beta": 0.5} | changes.pop("dpo", {})
    run_dpo(
        files.model, TrainingConfig(**(train | changes)), DPOConfig(**dpo),
        PreferenceDatasetConfig(**options), lora_config=lora,
    )  # fmt: skip
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_window_above_the_data_trains_as_whole_tables_do(files, tmp_path):
    whole = run(files, tmp_path / "whole", window=None, max_steps=8)
    assert whole == run(files, tmp_path / "stream", window=100, max_steps=8)
    assert whole[-1] < whole[0] - 0.01


@pytest.mark.parametrize(
    "lora", [None, pytest.param(LoraConfig(rank=4), marks=pytest.mark.slow)], ids=["full", "lora"]
)
def test_stored_values_are_those_of_a_live_reference(lora, files, tmp_path, monkeypatch):
    scored: list[int] = []
    real = reference_pass.fill

    def counted(runtime, answers, *others, **options):
        report = real(runtime, answers, *others, **options)
        scored.append(report.scored)
        return report

    monkeypatch.setattr(reference_pass, "fill", counted)
    cached = run(files, tmp_path / "cached", lora=lora)
    # Three windows of the first pass; what follows is known.
    assert len(scored) == 3 and all(0 < n <= 2 * WINDOW for n in scored), scored
    live = run(files, tmp_path / "live", lora=lora, dpo={"reference": "model"})
    np.testing.assert_allclose(cached, live, atol=1e-5)
    assert len(set(cached)) == STEPS
    # Where the store has all, no reference is loaded in any window.
    monkeypatch.setattr(reference_pass.ReferencePass, "compute", only_first(reference_pass))
    again = run(files, tmp_path / "again", lora=lora, dpo={"reference": "store"})
    assert again == cached


def only_first(module):
    """`compute` that refuses to load a reference of its own."""
    real = module.ReferencePass.compute

    def compute(self, policy):
        assert policy is not None, "a reference was loaded though the store had all values"
        return real(self, policy)

    return compute


@pytest.mark.parametrize("step", [5, 11])
def test_a_resumed_run_is_bitwise_the_run_without_a_break(step, files, tmp_path):
    whole = run(files, tmp_path / "whole")
    with broken_at(step), pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "broken")
    assert run(files, tmp_path / "broken") == whole


def test_a_store_that_lacks_a_later_window_is_named(files, tmp_path):
    run(files, tmp_path / "first", max_steps=3)
    with pytest.raises(StorageError, match=r"lacks \d+ of \d+ answers of the training pairs"):
        run(files, tmp_path / "second", dpo={"reference": "store"})


def test_losses_across_pairs_and_weights_and_evaluation(files, tmp_path):
    data = {"eval_fraction": 0.2}
    cached = run(files, tmp_path / "a", data=data, eval_every=4, dpo={"loss_type": "aot"})
    live = run(
        files, tmp_path / "b", data=data, eval_every=4,
        dpo={"loss_type": "aot", "reference": "model"},
    )  # fmt: skip
    np.testing.assert_allclose(cached, live, atol=1e-5)


def test_steps_go_without_pairs_that_have_no_value():
    table = random_pairs([(3, 4, 5)] * 10)
    order = Order(10, 4, 7)
    source = BatchSource(
        Examples(table, trees=True), order, Budget(tokens=100), rank=0, world=1,
        shared=Sharing.LINE,
    )  # fmt: skip
    gone = tuple(int(i) for i in [*order.step(0), order.step(1)[2]])
    leave_out_of_steps(source, gone)
    assert source.order.step(0).tolist() == []
    assert source.order.step(1).tolist() == np.delete(order.step(1), 2).tolist()
    assert source.order.step(2).tolist() == order.step(2).tolist()
    assert source.order.digest == order.digest
    (batch,) = source.micro_batches(0)
    assert batch.lengths.shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "data.streaming needs train.max_steps"),
        (
            ["--train.max_steps", "9", "--dpo.reference_sync_every", "2"],
            "data.streaming and dpo.reference_sync_every exclude each other",
        ),
        (["--train.max_steps", "9", "--data.order", "age"], "streaming knows no order of all rows"),
    ],
)
def test_what_needs_all_rows_is_refused_in_one_line(options, sentence, files, tmp_path, capsys):
    arguments = ["dpo", "--sft_checkpoint", str(tmp_path / "none"), "--train.run_name", "x"]
    arguments += ["--train.output_dir", str(tmp_path / "run"), "--data.streaming"]
    arguments += ["--data.dataset_name", str(files.data)]
    assert main([*arguments, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and sentence in error, error


def test_a_dry_run_reads_one_window(files, tmp_path):
    arguments = ["dpo", "--sft_checkpoint", str(files.model), "--train.run_name", "x"]
    arguments += ["--train.output_dir", str(tmp_path / "run"), "--data.streaming", "--dry-run"]
    arguments += ["--data.dataset_name", str(files.data), "--train.max_steps", "9"]
    assert (
        main(
            [
                *arguments,
                "--data.streaming_window",
                "12",
                "--train.batch_size",
                "4",
                "--dpo.max_length",
                "96",
            ]
        )
        == 0
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def in_processes(files, folder: Path, breaks: int | None) -> list[float]:
    if breaks is None:
        return run(files, folder)
    with broken_at(breaks), pytest.raises(KeyboardInterrupt):
        run(files, folder)
    return []


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_its_run(files, tmp_path, monkeypatch):
    alone = run(files, tmp_path / "alone")
    for found in run_ranks(in_processes, 2, files, tmp_path / "two", None, timeout=300):
        np.testing.assert_allclose(found, alone, atol=1e-5)
    in_processes(files, tmp_path / "half", 8)
    for found in run_ranks(in_processes, 2, files, tmp_path / "half", None, timeout=300):
        np.testing.assert_allclose(found, alone, atol=1e-5)


def in_stages(files, folder: Path) -> dict[int, list[float]]:
    found = {}
    for number in (2, 3):
        use_deepspeed(stage(number), folder)
        found[number] = run(files, folder / f"zero{number}")
    return found


@pytest.mark.slow
def test_sharded_references_are_loaded_for_each_window(files, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    alone = run(files, tmp_path / "alone")
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "another"))
    for found in run_ranks(in_stages, 2, files, tmp_path, timeout=500):
        for losses in found.values():
            np.testing.assert_allclose(losses, alone, atol=1e-4)
