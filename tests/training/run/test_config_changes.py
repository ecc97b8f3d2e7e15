"""Every setting has a class that decides whether a run may resume with another value of it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import yaml

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.base import OnResume
from modern_llm.config.data import MixtureSource
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import UserError
from modern_llm.config.model import MoEConfig
from modern_llm.training.run.config_changes import class_of
from modern_llm.training.run.folder import RunFolder
from modern_llm.training.run.opening import record_of
from tests.training.checkpointing.test_resume import call, numbers

MODEL = ModernLLMConfig(vocab_size=97, use_moe=True, moe_config=MoEConfig())
DATA = {
    "documents": DocumentDatasetConfig(dataset_name="d"),
    "instructions": InstructionDatasetConfig(dataset_name="d"),
    "preferences": PreferenceDatasetConfig(dataset_name="d"),
    "mixture": PreferenceDatasetConfig(sources=[MixtureSource(dataset_name="d")]),
}
RUN = ("sft_checkpoint", "pretrain_checkpoint", "tokenizer_name")
SECTIONS = {
    "train": [TrainingConfig], "model": [ModernLLMConfig], "model.moe_config": [MoEConfig],
    "lora": [LoraConfig], "dpo": [DPOConfig], "data": [type(data) for data in DATA.values()],
}  # fmt: skip
FIELDS = sorted(
    {
        f"{section}.{field.name}"
        for section, classes in SECTIONS.items()
        for one in classes
        for field in dataclasses.fields(one)
    }
    | set(RUN)
)


def record(folder, **changes) -> tuple[TrainingConfig, dict]:
    config = TrainingConfig(run_name="r", output_dir=folder, **changes)
    sections = {name: "there" for name in RUN}
    return config, record_of(
        train=config, model=MODEL, data=DATA["mixture"], dpo=DPOConfig(), lora=LoraConfig(),
        **sections,
    )  # fmt: skip


@pytest.mark.parametrize("schema", [one for classes in SECTIONS.values() for one in classes])
def test_every_field_has_exactly_one_class_and_a_help_text(schema):
    for name, field in schema.__pydantic_fields__.items():
        marks = [mark for mark in field.metadata if isinstance(mark, OnResume)]
        assert len(marks) == 1, f"write {name}: Free[...], Accepted, SameContent or Fixed"
        assert field.description, f"write a docstring below {name}"


# The date of chat templates is copied from the run in the folder: see test_template_day.
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "data.template_date"])
def test_a_changed_field_is_judged_by_its_class(name, tmp_path, caplog):
    _, before = record(tmp_path)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    section, _, field = name.rpartition(".")
    place = before
    for part in filter(None, section.split(".")):
        place = place[part]
    place[field] = "as it was"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))

    strict, lax = (RunFolder(*record(tmp_path, **w)) for w in ({}, {"accept_change": True}))
    kind = class_of(name)
    if kind == OnResume.FREE:
        with caplog.at_level(logging.INFO):
            strict.refuse_foreign()
            lax.refuse_foreign()
        assert name in caplog.text and "(free)" in caplog.text
        return
    with pytest.raises(UserError) as refusal:
        strict.refuse_foreign()
    assert f"{name}: 'as it was' -> " in str(refusal.value) and f"({kind.value})" in str(
        refusal.value
    )
    assert "name another output_dir" in str(refusal.value)
    assert ("add --accept-change" in str(refusal.value)) == (
        kind in (OnResume.ACCEPTED, OnResume.CONTENT)
    )
    if kind == OnResume.FORBIDDEN:
        with pytest.raises(UserError, match="forbidden"):
            lax.refuse_foreign()
    else:
        with caplog.at_level(logging.INFO):
            lax.refuse_foreign()
        assert f"resuming with another setting: {name}: 'as it was' -> " in caplog.text


def test_the_classes_that_the_documentation_promises():
    promised = {
        OnResume.FREE: "train.log_every train.save_every train.eval_every",
        OnResume.ACCEPTED: "train.learning_rate train.max_steps train.epochs train.weight_decay "
        "train.schedule train.warmup_steps train.warmup_ratio",
        OnResume.FORBIDDEN: "train.batch_size train.seed model.d_model model.vocab_size "
        "dpo.loss_type dpo.beta data.template lora.rank",
    }
    for kind, names in promised.items():
        assert {name: class_of(name) for name in names.split()} == dict.fromkeys(
            names.split(), kind
        )
    assert class_of("novelty.field") == class_of("train.novelty") == OnResume.FORBIDDEN


def test_a_section_that_comes_or_goes_is_forbidden(tmp_path):
    config, now = record(tmp_path, accept_change=True)
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**now, "lora": None}))
    with pytest.raises(UserError, match=r"lora: None -> .* \(forbidden\)"):
        RunFolder(config, now).refuse_foreign()


@pytest.mark.parametrize("data", DATA)
def test_an_option_that_an_older_configuration_lacks_had_its_default(tmp_path, data, caplog):
    config = TrainingConfig(run_name="r", output_dir=tmp_path)
    now = record_of(train=config, model=MODEL, data=DATA[data], dpo=DPOConfig(), lora=LoraConfig())
    older = copy.deepcopy(now)
    lacked = {
        "train": ["adam_epsilon", "skip_loss_spikes", "trackers"], "dpo": ["nll_coefficient"],
        "model": ["rope_scaling"], "lora": ["alpha"], "data": ["on_bad_row", "eval_fraction"],
    }  # fmt: skip
    for section, names in lacked.items():
        for name in names:
            del older[section][name]
    del older["model"]["moe_config"]["top_k"]
    if data == "mixture":
        del older["data"]["sources"][0]["weight"]
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(older))
    with caplog.at_level(logging.INFO):
        RunFolder(config, now).refuse_foreign()
    assert "another setting" not in caplog.text

    config = dataclasses.replace(config, adam_epsilon=1e-6, accept_change=True)
    now["train"] = record_of(train=config)["train"]
    with caplog.at_level(logging.INFO):
        RunFolder(config, now).refuse_foreign()
    assert "train.adam_epsilon: 1e-08 -> 1e-06 (allowed with --accept-change)" in caplog.text


def test_accept_change_is_valid_for_one_start(tmp_path):
    RunFolder(*record(tmp_path, accept_change=True)).open()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["train"]["accept_change"] is False


@pytest.mark.slow
def test_a_run_resumes_with_another_rate_and_more_steps(tmp_path, tiny_checkpoint, tiny_pairs):
    folder = tmp_path / "run"
    call(folder, tiny_checkpoint, tiny_pairs, max_steps=5)
    before = numbers(folder)
    changes = {"max_steps": 8, "learning_rate": 2e-3, "schedule": "constant"}
    with pytest.raises(UserError, match="--accept-change"):
        call(folder, tiny_checkpoint, tiny_pairs, **changes)
    assert numbers(folder) == before
    call(folder, tiny_checkpoint, tiny_pairs, **changes, accept_change=True)
    after = numbers(folder)
    assert [step for step, *_ in after] == list(range(1, 9))
    assert after[:4] == before[:4], "resumed from the checkpoint of step 4"
    assert {rate for *_, rate in after[4:]} == {2e-3}
    assert json.loads((folder / "outcome.json").read_text())["last_step"] == 8
    # No change is left to accept, and the run is done.
    call(folder, tiny_checkpoint, tiny_pairs, **changes)
    assert numbers(folder) == after

    with pytest.raises(UserError, match="step-00000006 is past the 3 steps"):
        call(folder, tiny_checkpoint, tiny_pairs, max_steps=3, accept_change=True,
             learning_rate=2e-3, schedule="constant")  # fmt: skip
