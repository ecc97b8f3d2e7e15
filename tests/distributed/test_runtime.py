"""Collectives of the runtime: sums, objects, one builder per machine, errors raised on all
ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, DataError, PeerError, UserError
from modern_llm.distributed.runtime import start
from tests.helpers.ranks import run_ranks


def config(**changes) -> TrainingConfig:
    return TrainingConfig(run_name="x", output_dir=Path("unused"), **changes)


def on_a_rank(folder: Path) -> dict:
    runtime = start(config())
    seen: dict = {"world": torch.distributed.get_world_size(), "rank": runtime.rank}
    seen["sum"] = runtime.sum(torch.tensor([1.0 + runtime.rank, 2.0])).tolist()
    seen["gather"] = runtime.gather(("rank", runtime.rank))
    seen["from_main"] = runtime.from_main(f"said by {runtime.rank}")
    with runtime.one_per_machine_first():
        found = (folder / "built").exists()
        (folder / "built").write_text("")
    seen["found"] = found
    try:
        with runtime.one_per_machine_first():
            if runtime.accelerator.is_local_main_process:
                raise DataError("line 7 is broken")
    except DataError as error:
        seen["error"] = str(error)
    try:
        runtime.on_main(lambda: (folder / "no" / "such").write_text(""))
    except (OSError, RuntimeError) as error:
        seen["on_main"] = type(error).__name__, str(error)
    runtime.agree("same", "the data")
    try:
        runtime.agree(f"other {runtime.rank}", "the data")
    except PeerError as error:
        seen["differ"] = str(error)
    return seen


@pytest.mark.slow
def test_two_processes(tmp_path):
    for rank, seen in enumerate(run_ranks(on_a_rank, 2, tmp_path)):
        assert seen["world"] == 2
        assert seen["rank"] == rank
        assert seen["sum"] == [3.0, 4.0]
        assert seen["gather"] == [("rank", 0), ("rank", 1)]
        assert seen["from_main"] == "said by 0"
        assert seen["found"] == (rank == 1)
        assert seen["error"] == "line 7 is broken"
        assert "No such file" in seen["on_main"][1]
        assert "the data" in seen["differ"] and "rank 1" in seen["differ"]


def test_a_single_process_needs_no_group():
    runtime = start(config())
    assert (runtime.rank, runtime.world, runtime.is_main) == (0, 1, True)
    assert runtime.gather(3) == [3]
    assert runtime.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert not torch.distributed.is_initialized()


def test_stages_of_one_process_may_differ_in_precision():
    assert start(config(mixed_precision="bf16")).accelerator.mixed_precision == "bf16"
    assert start(config()).accelerator.mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 is fine on a GPU")
def test_float16_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        start(config(mixed_precision="fp16"))


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP needs a GPU"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "true"},
            "use_cpu silently switches DeepSpeed off",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "accelerate launch sets mixed precision bf16"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "gone.json"},
            "deepspeed_config_file gone.json: No such file",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU cannot do")
def test_settings_that_would_silently_change_are_refused(environment, sentence, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        start(config())


def test_an_unexpected_world_size_is_refused(monkeypatch, capsys):
    from modern_llm.cli import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo", "--expect-world", "3"]) == 2
    assert "--expect-world 3, but the launcher started 2" in capsys.readouterr().err


@pytest.mark.slow
def test_fewer_examples_than_processes_are_refused_with_the_numbers_that_work(tmp_path):
    message = "smaller than the 2 processes.*use at least 2, or start at most 1"
    with pytest.raises(UserError, match=message):
        run_ranks(too_many, 2, tmp_path)


def too_many(folder: Path) -> None:
    from modern_llm.training.run.opening import open_run

    config = TrainingConfig(run_name="x", output_dir=folder / "run", batch_size=1)
    open_run(config, sft_checkpoint="unused")


def lonely() -> str:
    os.environ["WORLD_SIZE"] = "1"
    return str(start(config()).world)


def test_a_world_of_one_by_environment_is_one(tmp_path):
    assert run_ranks(lonely, 1) == ["1"]
