"""Adapters: which weights train, what the reference is, what is saved, and merging."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from modern_llm.cli import main
from modern_llm.config import (
    InstructionDatasetConfig,
    LoraConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.setup import policy
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_sft import run_sft
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import WORDS, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

peft = pytest.importorskip("peft", reason="peft is not installed (extra: lora)")


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": 6, "max_steps": 8, "log_every": 1,
        "learning_rate": 1e-2, "tokens_per_micro_batch": 300, "save_every": 3,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def dpo(checkpoint, pairs, folder: Path, lora=None, dpo_config=None, **train) -> Path:
    return run_dpo(
        checkpoint,
        config(folder, **train),
        DPOConfig(**({"max_length": 96} | (dpo_config or {}))),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
        lora_config=lora or LoraConfig(rank=4),
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 30)[None]).logits


def load(place):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint, tiny_pairs):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return dpo(tiny_checkpoint, tiny_pairs, folder)


def test_adapters_alone_are_trained_saved_and_read_by_peft(trained, tiny_checkpoint):
    found = losses(trained.parent)
    assert found[0] == pytest.approx(0.6931, abs=1e-3) and min(found) < 0.6
    names = {path.name for path in trained.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert not any(name.startswith("model") for name in names)
    base = load(tiny_checkpoint)
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, trained).eval()
    assert float((logits(model) - before).abs().max()) > 1e-3, "it must have learnt"
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    # Plain transformers reads the folder as well, base and adapters together.
    assert torch.allclose(logits(load(trained)), logits(model), atol=1e-5)


def test_export_merge_gives_a_plain_model(trained, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "plain"
    command = ["export", "--model", str(trained), "--output", str(out)]
    assert main(command) == 2
    assert "set merge" in capsys.readouterr().err
    assert main([*command, "--merge", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output"] == str(out)
    assert not (out / "adapter_config.json").exists()
    model = peft.PeftModel.from_pretrained(load(tiny_checkpoint), trained).eval()
    assert torch.allclose(logits(load(out)), logits(model), atol=1e-5)
    low = tmp_path / "low"
    assert main([*command[:-1], str(low), "--merge", "--dtype", "bfloat16"]) == 0
    from safetensors.torch import load_file

    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(load_file(low / "model.safetensors")[name], tensor.bfloat16())
    again = ["export", "--model", str(out), "--output", str(tmp_path / "x"), "--merge"]
    assert main(again) == 2 and "not an adapter" in capsys.readouterr().err


def test_the_reference_is_the_base_whatever_the_mode(
    trained, tiny_checkpoint, tiny_pairs, tmp_path
):
    live = dpo(tiny_checkpoint, tiny_pairs, tmp_path / "live", dpo_config={"reference": "model"})
    assert losses(live.parent) == pytest.approx(losses(trained.parent), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_adapters_train_on(
    trained, tiny_checkpoint, tiny_pairs, tmp_path
):

    with broken_at(5), pytest.raises(KeyboardInterrupt):
        dpo(tiny_checkpoint, tiny_pairs, tmp_path / "run")
    saved = tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors"
    whole = (tiny_checkpoint / "model.safetensors").stat().st_size
    assert saved.stat().st_size < whole / 2, "the frozen weights are not saved again"
    final = dpo(tiny_checkpoint, tiny_pairs, tmp_path / "run")
    assert losses(final.parent) == losses(trained.parent)
    # A stage accepts adapters like any checkpoint: merged, and as their own reference.
    second = dpo(trained, tiny_pairs, tmp_path / "second", max_steps=2)
    assert losses(second.parent)[0] == pytest.approx(0.6931, abs=1e-3)


def test_sft_with_dropout_and_modules_trained_whole(tiny_checkpoint, tmp_path):
    rows = [{"prompt": f"say {w}:", "response": f" {w}" * (1 + i % 6)} for i, w in enumerate(WORDS)]
    data = write_jsonl(tmp_path / "answers.jsonl", rows)
    final = run_sft(
        tiny_checkpoint,
        config(tmp_path / "sft"),
        InstructionDatasetConfig(dataset_name=str(data)),
        lora_config=LoraConfig(
            rank=4, dropout=0.1, targets=["q_proj", "v_proj"], modules_to_save=["lm_head"]
        ),
    )
    found = losses(final.parent)
    assert found[-1] < found[0]
    model = peft.PeftModel.from_pretrained(load(tiny_checkpoint), final).eval()
    assert torch.allclose(logits(load(final)), logits(model), atol=1e-5)
    head = model.base_model.model.lm_head.modules_to_save.default.weight
    assert float((head.detach() - load(tiny_checkpoint).lm_head.weight).abs().max()) > 1e-4


def on_a_rank(checkpoint, pairs, folder: Path) -> dict:
    kinds = {
        "ddp": None,
        "zero2": stage(2),
        "zero3": stage(3),
        "live2": stage(2),
        "live3": stage(3),
    }
    result = {}
    for name, content in kinds.items():
        use_deepspeed(content, folder)
        mode = {"reference": "model" if name.startswith("live") else "cache"}
        dpo(checkpoint, pairs, folder / name, dpo_config=mode)
        assert torch.distributed.get_world_size() == 2
        result[name] = losses(folder / name)
    return result


@pytest.mark.slow
def test_on_two_processes_under_zero(trained, tiny_checkpoint, tiny_pairs, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    expected = losses(trained.parent)
    for seen in run_ranks(on_a_rank, 2, tiny_checkpoint, tiny_pairs, tmp_path, timeout=250):
        for name, found in seen.items():
            assert found == pytest.approx(expected, rel=1e-4), name
    for name in ("zero2", "zero3"):
        place = tmp_path / name / "x_final"
        assert torch.allclose(logits(load(place)), logits(load(trained)), atol=2e-3), name


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"dropout": 0.1}, "DPO trains without dropout"),
        ({"targets": ["q_pro"]}, "lora.targets: no module of this model is called 'q_pro'"),
        ({"modules_to_save": ["head"]}, "lora.modules_to_save: no module .* 'head'"),
        pytest.param(
            {"quantize": "nf4"},
            "lora.quantize nf4 needs a GPU.*mixed_precision to bf16",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can"),
        ),
    ],
)
def test_options_that_adapters_do_not_support_are_refused(
    lora, sentence, tiny_checkpoint, tiny_pairs, tmp_path
):
    with pytest.raises(ConfigError, match=sentence):
        dpo(tiny_checkpoint, tiny_pairs, tmp_path / "run", lora=LoraConfig(**lora))


def test_few_bits_and_zero_3_exclude_each_other(monkeypatch, tmp_path):
    from modern_llm.config import TrainingConfig
    from modern_llm.setup.policy import check_lora

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = TrainingConfig(run_name="x", output_dir=tmp_path, mixed_precision="bf16")
    few = LoraConfig(quantize="nf4")
    for number in (None, 2):
        check_lora(SimpleNamespace(stage=number), few, config, dropout=False)
    with pytest.raises(ConfigError, match="ZeRO-3 cannot shard weights of few bits; use .*zero2"):
        check_lora(SimpleNamespace(stage=3), few, config, dropout=False)


def test_contradictions_are_refused_at_construction(trained, tmp_path):
    with pytest.raises(ValueError, match="trained whole or by an adapter, not both"):
        LoraConfig(targets=["lm_head"], modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="name at least one layer"):
        LoraConfig(targets=[])
    from modern_llm.models.load import inspect_checkpoint

    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        inspect_checkpoint(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["cache", "model"])
def test_a_frozen_base_in_16_bits_changes_no_number(
    reference, tiny_checkpoint, tiny_pairs, tmp_path, monkeypatch
):
    """Under autocast a product rounds its weights anyway; the base then needs half the memory."""
    settings = {"mixed_precision": "bf16", "max_steps": 4}
    real, kinds = policy.read_rounded, []

    def noted(model, precision, device):
        real(model, precision, device)
        frozen = [(n, p.dtype) for n, p in model.named_parameters() if not p.requires_grad]
        kinds.append({n for n, dtype in frozen if dtype == torch.bfloat16})
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    def run(name: str) -> Path:
        options = {"reference": reference}
        return dpo(tiny_checkpoint, tiny_pairs, tmp_path / name, dpo_config=options, **settings)

    monkeypatch.setattr(policy, "read_rounded", noted)
    rounded = run("rounded")
    monkeypatch.setattr(policy, "_rounds_base", lambda *of: False)
    whole = run("whole")
    assert sum("_proj.base_layer.weight" in name for name in kinds[0]) == 7 * 2
    assert losses(rounded.parent) == losses(whole.parent)
    first, second = (load_file(place / "adapter_model.safetensors") for place in (rounded, whole))
    assert all(torch.equal(first[name], second[name]) for name in first)
    out = tmp_path / "merged"
    assert main(["export", "--model", str(rounded), "--output", str(out), "--merge"]) == 0
    merged = load_file(out / "model.safetensors")
    assert not any(torch.equal(t, t.bfloat16().float()) for n, t in merged.items() if "_proj" in n)
