"""Trackers, the display and samples of a real run show what the run did."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.training.monitoring import trackers as trackers_module
from modern_llm.training.monitoring.monitor import Monitor
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import stage, use_deepspeed


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "w", "output_dir": folder, "batch_size": 6, "max_steps": 4, "log_every": 1,
        "learning_rate": 1e-2, "tokens_per_micro_batch": 300,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def run(checkpoint, pairs, training, **data) -> Path:
    return run_dpo(
        checkpoint,
        training,
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(pairs), **data),
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tensorboard_gets_every_metric_under_its_name(tmp_path, tiny_checkpoint, tiny_pairs):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tiny_checkpoint, tiny_pairs, config(tmp_path, trackers=["tensorboard"]))
    (folder,) = (tmp_path / "trackers").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    records = lines(tmp_path / "metrics.jsonl")
    for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "lr"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [1, 2, 3, 4]
        assert [v for _, v in found] == pytest.approx([r[name] for r in records], rel=1e-5)


def test_a_tracker_that_is_not_installed_is_refused_before_anything(
    tmp_path, monkeypatch, tiny_checkpoint, tiny_pairs
):
    monkeypatch.setattr(trackers_module, "get_available_trackers", list)
    with pytest.raises(ConfigError, match=r"wandb .*modern-llm\[wandb\].*aim .*pip install aim"):
        run(tiny_checkpoint, tiny_pairs, config(tmp_path / "r", trackers=["wandb", "aim"]))
    assert not (tmp_path / "r").exists()


def test_a_tracker_that_fails_is_switched_off_and_the_run_continues(
    tmp_path, monkeypatch, caplog, tiny_checkpoint, tiny_pairs
):
    class Failing:
        requires_logging_directory = False
        seen: list[int] = []

        def __init__(self, project, **options):
            assert project == "modern-llm" and options["resume"] == "allow"

        def start(self):
            pass

        def store_init_configuration(self, values):
            assert values["dpo.beta"] == 0.1 and values["train.epochs"] == "null"

        def log(self, values, step):
            self.seen.append(step)
            if step == 2:
                raise ConnectionError("the server is away\nmore")

        def finish(self):
            raise AssertionError("it was switched off")

    monkeypatch.setitem(trackers_module.LOGGER_TYPE_TO_CLASS, "wandb", Failing)
    monkeypatch.setattr(trackers_module, "get_available_trackers", lambda: ["wandb"])
    with caplog.at_level(logging.WARNING, logger="modern_llm"):
        run(tiny_checkpoint, tiny_pairs, config(tmp_path, trackers=["wandb"]))
    assert Failing.seen == [1, 2]
    assert "tracker wandb is switched off: the server is away" in caplog.text
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def own_answer(model: Path, prompt_ids: list[int], tokens: int) -> str:
    """Return what plain `transformers` generates."""
    import torch

    loaded, tokenizer = (
        kind.from_pretrained(model) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    output = loaded.generate(
        torch.tensor([prompt_ids]), max_new_tokens=tokens, do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)


def sampled(folder: Path, checkpoint: Path, pairs: Path) -> list[dict]:
    training = config(folder, generate_every=2, generate_tokens=8)
    run(checkpoint, pairs, training, eval_fraction=0.3)
    return lines(folder / "samples.jsonl")


def test_samples_are_the_models_answers_beside_the_references(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    samples = sampled(tmp_path, tiny_checkpoint, tiny_pairs)
    assert [(s["step"], s["number"]) for s in samples] == [
        (n, i) for n in (0, 2, 4) for i in range(3)
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    changed = 0
    for before, after in zip(samples[:3], samples[6:], strict=True):
        ids = tokenizer(before["prompt"])["input_ids"]
        assert tokenizer.decode(ids) == before["prompt"] == after["prompt"]
        assert before["policy"] == own_answer(tiny_checkpoint, ids, 8)
        assert after["reference"] == before["policy"]
        assert after["policy"] == own_answer(tmp_path / "w_final", ids, 8)
        changed += after["policy"] != after["reference"]
    assert changed, "the policy was not trained"
    record = lines(tmp_path / "metrics.jsonl")[-1]
    assert record["samples/policy_tokens"] == sum(s["policy_tokens"] for s in samples[6:]) / 3
    assert record["samples/reference_tokens"] == sum(s["policy_tokens"] for s in samples[:3]) / 3
    assert "Sample answers" in (tmp_path / "report.html").read_text()


def test_sampling_changes_nothing_of_the_training(tmp_path, tiny_checkpoint, tiny_pairs):
    sampled(tmp_path / "with", tiny_checkpoint, tiny_pairs)
    run(tiny_checkpoint, tiny_pairs, config(tmp_path / "without"), eval_fraction=0.3)
    names = ("loss", "grad_norm", "logps/chosen")
    a, b = (
        [[r[n] for n in names] for r in lines(tmp_path / f / "metrics.jsonl")]
        for f in ("with", "without")
    )
    assert a == b


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference_answers(tmp_path, tiny_checkpoint, tiny_pairs):
    whole = sampled(tmp_path / "whole", tiny_checkpoint, tiny_pairs)
    training = config(tmp_path / "cut", generate_every=2, generate_tokens=8, save_every=2)
    run(tiny_checkpoint, tiny_pairs, training, eval_fraction=0.3)
    # The state after a kill in step 3.
    for name in ("outcome.json", "w_final/config.json"):
        (tmp_path / "cut" / name).unlink()
    run(tiny_checkpoint, tiny_pairs, training, eval_fraction=0.3)
    assert lines(tmp_path / "cut" / "samples.jsonl") == whole


def on_a_rank(folder, checkpoint, pairs, sharded: bool) -> list[list[dict]]:
    import torch.distributed as dist

    found = [sampled(folder / "plain", checkpoint, pairs)]
    if sharded:
        use_deepspeed(stage(3), folder)
        found.append(sampled(folder / "zero3", checkpoint, pairs))
        use_deepspeed(None, folder)
    assert dist.get_world_size() == 2
    return found


@pytest.mark.slow
def test_two_processes_answer_as_one_with_whole_and_with_sharded_weights(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    sharded = importlib.util.find_spec("deepspeed") is not None
    alone = sampled(tmp_path / "one", tiny_checkpoint, tiny_pairs)
    first, second = run_ranks(
        on_a_rank, 2, tmp_path / "two", tiny_checkpoint, tiny_pairs, sharded, timeout=250
    )
    assert first == second
    for samples in first:
        assert len(samples) == len(alone) and samples[:3] == alone[:3]


def test_given_prompts_use_the_runs_template(tmp_path, tiny_checkpoint, tiny_pairs):
    training = config(
        tmp_path, generate_every=4, generate_tokens=4, generate_prompts=["the cat", "why?"]
    )
    run(tiny_checkpoint, tiny_pairs, training, template="Q: {prompt}\nA:")
    prompts = [s["prompt"] for s in lines(tmp_path / "samples.jsonl")]
    assert prompts == ["Q: the cat\nA:", "Q: why?\nA:"] * 2


def test_prompts_without_a_step_are_refused():
    with pytest.raises(ValueError, match="generate_prompts has no effect without generate_every"):
        TrainingConfig(run_name="a", output_dir=Path("b"), generate_prompts=["x"])


def test_monitoring_takes_under_one_percent_of_a_100_ms_step(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    training = config(tmp_path, trackers=["tensorboard"], max_steps=400, log_every=10)
    folder = RunFolder(training, {"train": {"run_name": "w"}})
    record = {f"metric/{n}": float(n) for n in range(20)} | {"loss": 0.5, "grad_norm": 1.0}
    with Monitor(training, folder, 400, 0, shown=True) as watch:
        began = time.process_time()
        for step in range(1, 401):
            watch.advance(step)
            if step % training.log_every == 0:
                watch.record(step, record | {"step": step})
        used = time.process_time() - began
    assert used / 400 < 1e-3, f"{used / 400 * 1e3:.3f} ms a step"
    assert len(lines(tmp_path / "metrics.jsonl")) == 40


@pytest.mark.slow
def test_a_profile_traces_the_requested_steps_and_names_the_slowest_operations(
    tmp_path, tiny_checkpoint, tiny_pairs, capfd
):
    from modern_llm.cli import main

    plain = tmp_path / "plain"
    run(tiny_checkpoint, tiny_pairs, config(plain))
    capfd.readouterr()
    folder = tmp_path / "traced"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"sft_checkpoint: {tiny_checkpoint}\ndata: {{dataset_name: {tiny_pairs}}}\n"
        f"dpo: {{max_length: 96}}\ntrain: {{run_name: w, output_dir: {folder}, batch_size: 6, "
        "max_steps: 4, log_every: 1, learning_rate: 1.0e-2, tokens_per_micro_batch: 300}\n"
    )
    assert main(["dpo", "--config", str(file), "--profile", "2"]) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("profile:")]
    (trace,) = folder.glob("trace-*.json")
    assert trace.name == "trace-00000002-00000003.json"  # the first step warms up
    assert len(told) == 6
    assert told[0] == f"profile: 2 steps in {trace}"
    shares = [float(line.split()[1].rstrip("%")) for line in told[1:]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    # One fused update of the optimizer per step.
    assert names.count("Optimizer.step#AdamW.step") == 2
    losses = [[r["loss"] for r in lines(f / "metrics.jsonl")] for f in (plain, folder)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_profile_of_more_steps_than_there_are_ends_with_the_run(
    tmp_path, tiny_checkpoint, tiny_pairs, capfd
):
    run(tiny_checkpoint, tiny_pairs, config(tmp_path, profile_steps=50))
    assert "profile: 3 steps in" in capfd.readouterr().out
    assert [p.name for p in tmp_path.glob("trace-*")] == ["trace-00000002-00000004.json"]
