"""`train.attn_implementation`: the model's own kernel for separate rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from modern_llm.config import LoraConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import UserError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.models.load import inspect_checkpoint, load_model
from modern_llm.setup import policy, scorers
from modern_llm.training.train_dpo import run_dpo


def config(folder, **options) -> TrainingConfig:
    return TrainingConfig(
        run_name="t", output_dir=folder, batch_size=4, max_steps=3, log_every=1,
        learning_rate=1e-3, attention="separate", **options,
    )  # fmt: skip


def test_both_kernels_train_alike_and_the_run_records_which(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    kernels, make = [], scorers.make_scorer

    def noted(model, *args, **options):
        kernels.append(model.config._attn_implementation)
        return make(model, *args, **options)

    monkeypatch.setattr(scorers, "make_scorer", noted)
    losses = {}
    for name in ("eager", "sdpa"):
        run_dpo(
            str(tiny_checkpoint),
            config(tmp_path / name, attn_implementation=name),
            DPOConfig(max_length=96, reference="model"),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
        assert set(kernels) == {name}
        kernels.clear()
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
        written = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert written["train"]["attn_implementation"] == name
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)
    assert len(losses["eager"]) == 3


def test_a_kernel_has_no_effect_on_trees_and_is_refused_there(tmp_path):
    with pytest.raises(ValueError, match="has no effect with attention auto.*set attention to sep"):
        TrainingConfig(run_name="t", output_dir=tmp_path, attn_implementation="sdpa")


def test_a_model_that_does_not_take_the_kernel_is_one_line(tmp_path, tiny_checkpoint, monkeypatch):
    model = load_model(inspect_checkpoint(str(tiny_checkpoint)))

    def refuse(name):
        raise ValueError("LlamaForCausalLM does not support it\nand more")

    monkeypatch.setattr(model, "set_attn_implementation", refuse)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(UserError, match=r"attn_implementation eager: .* \(.*not support it\): cho"):
        scorers._set_kernel(model, config(tmp_path, attn_implementation="eager"))


@pytest.mark.parametrize("stage", [None, 2, 3])
def test_a_frozen_model_is_probed_for_the_device_and_precision_of_the_run(
    stage, tiny_checkpoint, tmp_path, monkeypatch
):
    """Under DeepSpeed its weights are still on the host; before, it always got the dense mask."""
    asked = {}

    def noted(model, **options):
        asked.update(options)
        raise StopIteration

    monkeypatch.setattr(scorers, "make_scorer", noted)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *of: module)
    runtime = SimpleNamespace(
        stage=stage, device=torch.device("cuda", 0), attention_dtype=torch.bfloat16,
        rounds_weights=False, is_main=True, shards_weights=stage == 3,
        shards_frozen=stage is not None, sequence=None,
    )  # fmt: skip
    settings = TrainingConfig(run_name="t", output_dir=tmp_path)
    with pytest.raises(StopIteration):
        scorers.set_up_frozen(runtime, inspect_checkpoint(tiny_checkpoint), settings)
    assert asked["attention"] == "auto"
    assert asked["device"] == runtime.device and asked["dtype"] == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_weights_are_read_before_adapters_that_measure_them(
    monkeypatch, tmp_path, tiny_checkpoint, dora
):
    asked = {}

    def noted(*of, **options):
        asked.update(options)
        raise StopIteration

    monkeypatch.setattr(policy, "load_to_shard", noted)
    runtime = SimpleNamespace(stage=None, shards_weights=True, shards_frozen=True)
    settings = TrainingConfig(run_name="t", output_dir=tmp_path)
    with pytest.raises(StopIteration):
        policy.set_up_policy(
            runtime, inspect_checkpoint(tiny_checkpoint), settings, LoraConfig(dora=dora),
            dropout=False,
        )  # fmt: skip
    assert asked["sharded"] is not dora
