"""A run opens with the learning rate of its stage where none is set."""

from __future__ import annotations

import pytest
import yaml

import modern_llm as ml
from modern_llm.training.run.opening import RATES

SHAPE = {"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}
ROWS = {
    "pretrain": [{"text": "one two three " * 30} for _ in range(8)],
    "sft": [{"prompt": f"one two {i}", "response": " three"} for i in range(8)],
    "dpo": [{"prompt": f"one {i}", "chosen": " two", "rejected": " six"} for i in range(8)],
}


@pytest.mark.parametrize(("stage", "rate"), [("pretrain", 3e-4), ("sft", 2e-5), ("dpo", 5e-6)])
def test_each_stage_has_its_rate(tmp_path, tiny_checkpoint, stage, rate):
    fields = {"output_dir": tmp_path, "max_steps": 1, "batch_size": 4}
    if stage == "pretrain":
        ml.pretrain(SHAPE, ROWS[stage], tokenizer=str(tiny_checkpoint), **fields)
    else:
        lengths = {"max_length": 96}
        getattr(ml, stage)(tiny_checkpoint, ROWS[stage], **fields, **lengths)
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert record["train"]["learning_rate"] == rate and rate in RATES.values()


def test_a_rate_that_is_set_stays(tmp_path, tiny_checkpoint):
    ml.sft(
        tiny_checkpoint, ROWS["sft"], output_dir=tmp_path, max_steps=1, batch_size=4,
        learning_rate=1e-3,
    )  # fmt: skip
    record = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert record["train"]["learning_rate"] == 1e-3
