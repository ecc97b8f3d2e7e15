"""A DeepSpeed JSON with a run's configuration: no contradiction, no unknown key, nothing silent."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed.deepspeed_config import read_file, reference_config, resolve

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
ROOT = Path(__file__).resolve().parents[2]


def config(**changes) -> TrainingConfig:
    fields = {"learning_rate": 3e-4} | changes
    return TrainingConfig(run_name="x", output_dir=Path("unused"), **fields)


def zero(stage: int = 2, **options) -> dict:
    return {"zero_optimization": {"stage": stage, **options}}


@pytest.mark.parametrize(
    ("content", "train", "sentence"),
    [
        ({"train_batch_size": 16}, {}, "train_batch_size 16 contradicts train.batch_size 32"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"micro_batch_size": 4},
            "train_micro_batch_size_per_gpu 2 contradicts train.micro_batch_size 4",
        ),
        (
            {"gradient_accumulation_steps": 3},
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps 3 contradicts train.gradient_accumulation_steps 2",
        ),
        (
            {"gradient_clipping": 0.5},
            {},
            "gradient_clipping 0.5 contradicts train.max_grad_norm 1.0",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {},
            "optimizer.params.lr 0.001 contradicts train.learning_rate 0.0003",
        ),
        ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type 'Lion' contradicts"),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {},
            "scheduler.type 'WarmupLR' contradicts train.schedule 'cosine'",
        ),
        (
            {"bf16": {"enabled": True}},
            {},
            "bf16.enabled True contradicts train.mixed_precision 'no'",
        ),
        (
            {"bf16": {"enabled": False}},
            {"mixed_precision": "bf16"},
            "bf16.enabled False contradicts train.mixed_precision 'bf16'",
        ),
        ({"zero_optimisation": {}}, {}, "unknown key (did you mean zero_optimization?)"),
        ({"gradient_cliping": 1.0}, {}, "gradient_cliping: unknown key (did you mean gradient_cl"),
        ({"pipeline": {}}, {}, "pipeline: unknown key"),
        ({"bf16": {"enable": True}}, {}, "bf16.enable: unknown key (did you mean bf16.enabled?)"),
        (zero(2, stag3_x=1), {}, "zero_optimization.stag3_x: unknown key"),
        (
            zero(2, offload_optimizer={"devise": "cpu"}),
            {},
            "offload_optimizer.devise: unknown key (did you mean zero_optimization.offload_opti",
        ),
        (zero(7), {}, "zero_optimization.stage: must be 0, 1, 2 or 3, got 7"),
        (zero(2, offload_param={"device": "cpu"}), {}, "needs stage 3 or above, and stage is 2"),
        (
            zero(0, offload_optimizer={"device": "cpu"}),
            {},
            "needs stage 1 or above, and stage is 0",
        ),
        (zero(3, offload_param={"device": "nvme"}), {}, "use cpu"),
        (zero(3), {"compile": True}, "set train.compile false, or use stage 2"),
        (zero(0), {"mixed_precision": "fp16"}, "no loss scaler"),
    ],
)
def test_contradictions_unknown_keys_and_the_impossible_are_refused(content, train, sentence):
    with pytest.raises(ConfigError) as error:
        resolve(zero() | content, config(**train), "ds.json")
    assert str(error.value).startswith("ds.json: ")
    assert sentence in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(ConfigError) as error:
        resolve(zero(9) | {"a": 1, "train_batch_size": 1}, config(), "ds.json")
    assert len(error.value.problems) == 3


def test_what_agrees_is_taken_and_the_run_fills_the_rest():
    content = zero(2) | {
        "train_batch_size": 32,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
    }
    before = copy.deepcopy(content)
    found = resolve(content, config(mixed_precision="bf16", max_grad_norm=None), "ds.json")
    assert content == before
    assert found["gradient_clipping"] == 0.0
    assert found["bf16"]["enabled"] and not found["fp16"]["enabled"]
    assert "optimizer" not in found and "train_batch_size" not in found
    assert found["gradient_accumulation_steps"] == found["train_micro_batch_size_per_gpu"] == 1


def test_a_reference_is_sharded_whatever_the_policy_is():
    policy = resolve(zero(1), config(mixed_precision="bf16"), "ds.json")
    frozen = reference_config(policy)
    assert frozen["zero_optimization"] == {"stage": 3}
    assert frozen["bf16"]["enabled"]
    offloaded = zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"})
    frozen = reference_config(resolve(offloaded, config(), "ds.json"))
    assert frozen["zero_optimization"] == {"stage": 3, "offload_param": {"device": "cpu"}}


def test_a_file_that_is_no_json_object_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        read_file(str(tmp_path / "none.json"))
    (tmp_path / "broken.json").write_text("{,")
    with pytest.raises(ConfigError, match="broken.json: not JSON: .*line 1"):
        read_file(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="one JSON object"):
        read_file(str(tmp_path / "list.json"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_file_that_is_shipped_fits_every_run(precision):
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    for file in files:
        content = json.loads(file.read_text())
        found = resolve(content, config(mixed_precision=precision), file.name)
        assert found["zero_optimization"]["stage"] in (0, 1, 2, 3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_summed_in_float32_and_reduced_during_the_backward(stage, precision):
    found = resolve(zero(stage), config(mixed_precision=precision), "ds.json")
    low = precision == "bf16" and stage in (2, 3)
    assert found.get("data_types") == ({"grad_accum_dtype": "fp32"} if low else None)
    assert found["zero_optimization"].get("overlap_comm") is (True if stage in (2, 3) else None)
    off = zero(stage, overlap_comm=False) | {"data_types": {"grad_accum_dtype": "bf16"}}
    kept = resolve(off, config(mixed_precision=precision), "ds.json")
    assert kept["zero_optimization"]["overlap_comm"] is False
    assert kept["data_types"] == {"grad_accum_dtype": "bf16"}


def test_another_optimizer_of_deepspeed_is_refused():
    content = zero(1) | {"data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(ConfigError, match="grad_accum_dtype fp32 at stage 1"):
        resolve(content, config(mixed_precision="bf16"), "ds.json")
