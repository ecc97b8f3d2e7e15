"""What only a GPU shows: bfloat16 under every ZeRO stage, offload, FSDP2, optimizers, few bits.

All are skipped without one; `bash launch/test_gpu.sh` runs them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, run_cases, stage, weights

pytestmark = pytest.mark.gpu
LOW = {"max_steps": 8, "mixed_precision": "bf16"}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    checkpoint = make_checkpoint(
        folder / "model", make_tokenizer(folder / "tokenizer"), d_model=128, n_layers=4
    )
    return checkpoint, write_jsonl(folder / "p.jsonl", transcripts(60))


def near(found, expected, rel: float) -> None:
    assert len(found) == len(expected)
    for (loss, norm, rate), (other, other_norm, other_rate) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=rel)
        assert norm == pytest.approx(other_norm, rel=10 * rel)
        assert rate == other_rate


def test_bfloat16_under_every_stage_and_with_offload(tmp_path, inputs):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    cpu = {"device": "cpu", "pin_memory": True}
    cases = {"ddp": Case(tmp_path / "ddp", train=LOW)}
    cases |= {f"zero{n}": Case(tmp_path / f"zero{n}", stage(n), LOW) for n in (0, 1, 2, 3)}
    cases["offload2"] = Case(tmp_path / "offload2", stage(2, offload_optimizer=cpu), LOW)
    both = stage(3, offload_optimizer=cpu, offload_param=cpu)
    cases["offload3"] = Case(tmp_path / "offload3", both, LOW)
    live = {"reference": "model"}
    cases["live3"] = Case(tmp_path / "live3", stage(3), LOW, live)
    found = run_cases(1, *inputs, cases, timeout=400)
    for name in set(cases) - {"ddp"}:
        near(found[name], found["ddp"], 2e-2)
        for key, tensor in weights(tmp_path / name).items():
            assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all(), (name, key)


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(tmp_path, inputs):
    few = {"max_steps": 6}
    on_gpu = dpo(*inputs, Case(tmp_path / "gpu", train=few))
    (on_cpu,) = run_ranks(without_gpu, 1, *inputs, Case(tmp_path / "cpu", train=few))
    near(on_gpu, on_cpu, 1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_flex_attention_trains_like_the_dense_mask(precision, tmp_path, inputs):
    """Forward and backward: FlexAttention has no backward on a CPU, so only this shows it."""
    few = {"max_steps": 8, "mixed_precision": precision}
    found = {
        name: dpo(*inputs, Case(tmp_path / name, train=few | {"attention": name}))
        for name in ("mask", "flex", "separate")
    }
    for name in ("flex", "separate"):
        near(found[name], found["mask"], 1e-3 if precision == "no" else 2e-2)


def without_gpu(checkpoint: Path, data: Path, case: Case) -> list:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return dpo(checkpoint, data, case)


def sharded(checkpoint: Path, data: Path, case: Case) -> list:
    os.environ.update(FSDP)
    return dpo(checkpoint, data, case)


def test_fsdp2_trains_resumes_and_exports(tmp_path, inputs):
    few = {"max_steps": 6, "save_every": 2}
    plain = dpo(*inputs, Case(tmp_path / "plain", train=few))
    broken = Case(tmp_path / "fsdp", train=few, break_at=3)
    run_ranks(sharded, 1, *inputs, broken, timeout=200)
    (found,) = run_ranks(sharded, 1, *inputs, Case(tmp_path / "fsdp", train=few), timeout=200)
    near(found, plain, 1e-3)
    expected = weights(tmp_path / "plain")
    for name, tensor in weights(tmp_path / "fsdp").items():
        assert float((tensor - expected[name]).abs().max()) < 1e-3, name


@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_adapters_on_weights_of_few_bits(bits, tmp_path, inputs):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    from modern_llm.config import LoraConfig, PreferenceDatasetConfig, TrainingConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo
    from tests.helpers.zero import numbers

    checkpoint, data = inputs
    final = run_dpo(
        checkpoint,
        TrainingConfig(
            run_name="x", output_dir=tmp_path / "run", batch_size=8, log_every=1,
            learning_rate=1e-2, **LOW,
        ),
        DPOConfig(max_length=64),
        PreferenceDatasetConfig(dataset_name=str(data)),
        lora_config=LoraConfig(rank=4, quantize=bits),
    )  # fmt: skip
    assert (final / "adapter_model.safetensors").is_file()
    losses = [loss for loss, _, _ in numbers(tmp_path / "run")]
    assert min(losses) < losses[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": "bfloat16"},
        {"gradient_checkpointing": "offload"},
        {"weights": "bfloat16", "gradient_checkpointing": "offload", "attention": "flex"},
    ],
)
def test_ways_to_save_memory_train_like_float32_weights(changes, tmp_path, inputs):
    plain = dpo(*inputs, Case(tmp_path / "plain", train=LOW))
    found = dpo(*inputs, Case(tmp_path / "found", train=LOW | changes))
    near(found, plain, 2e-2 if "weights" in changes else 1e-3)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon", "adafactor"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_an_optimizer_resumes_on_the_gpu(optimizer, kept, tmp_path, inputs):
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    few = LOW | {"optimizer": optimizer, "weights": kept, "save_every": 2, "learning_rate": 1e-3}
    whole = dpo(*inputs, Case(tmp_path / "whole", train=few))
    dpo(*inputs, Case(tmp_path / "broken", train=few, break_at=5))
    again = dpo(*inputs, Case(tmp_path / "broken", train=few))
    near(again, whole, 1e-3)  # not to the bit: CUDA adds in any order
    assert min(loss for loss, _, _ in whole) < whole[0][0]
