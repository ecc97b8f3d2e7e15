"""A checkpoint that a run saved is a model like any other, in one file or in pieces."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from modern_llm.cli import main
from modern_llm.config import (
    DocumentDatasetConfig,
    LoraConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import StorageError, UserError
from modern_llm.config.model import MoEConfig
from modern_llm.models.checkpoint_tensors import stored_tensors, weight_files
from modern_llm.models.load import inspect_checkpoint, load_model, load_tokenizer
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_lm import run_training
from tests.helpers.zero import Case, run_cases, stage


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": 6, "max_steps": 3, "save_every": 2,
        "learning_rate": 1e-2, "schedule": "constant", "log_every": 1,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def dpo(start, pairs, folder: Path, lora=None, **changes) -> Path:
    data = PreferenceDatasetConfig(dataset_name=str(pairs))
    return run_dpo(
        start, config(folder, **changes), DPOConfig(max_length=96), data, lora_config=lora
    )


def logits(place) -> torch.Tensor:
    model = load_model(inspect_checkpoint(place))
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 30)[None]).logits


def content(place) -> dict[str, torch.Tensor]:
    checkpoint = inspect_checkpoint(place)
    return dict(stored_tensors(checkpoint, weight_files(checkpoint)))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_checkpoint, tiny_pairs) -> Path:
    """A run of three steps with a checkpoint of the second."""
    folder = tmp_path_factory.mktemp("run") / "run"
    dpo(tiny_checkpoint, tiny_pairs, folder)
    return folder


@pytest.fixture(scope="module")
def shorter(tmp_path_factory, tiny_checkpoint, tiny_pairs) -> Path:
    """The final model of the same run, ended after two steps."""
    return dpo(tiny_checkpoint, tiny_pairs, tmp_path_factory.mktemp("s") / "run", max_steps=2)


def test_it_is_the_model_of_its_step_also_for_plain_transformers(run, shorter):
    from transformers import AutoModelForCausalLM

    step = run / "checkpoints" / "step-00000002"
    assert torch.equal(logits(step), logits(shorter))
    plain = AutoModelForCausalLM.from_pretrained(step, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=torch.arange(3, 30)[None]).logits, logits(shorter))
    assert load_tokenizer(step).get_vocab() == load_tokenizer(shorter).get_vocab()


def test_last_is_the_newest_that_is_intact(run, tmp_path):
    assert inspect_checkpoint(run / "last").place == str(run / "checkpoints" / "step-00000002")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.copytree(copy / "checkpoints/step-00000002", copy / "checkpoints/step-00000003")
    (copy / "checkpoints/step-00000003/model.safetensors").write_bytes(b"damaged")
    assert inspect_checkpoint(copy / "last").place.endswith("step-00000002")
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint"):
        inspect_checkpoint(copy / "last")


def test_its_digest_is_that_of_the_same_weights_elsewhere(run, shorter):
    step, final = content(run / "last"), content(shorter)
    assert step.keys() == final.keys()
    assert all(torch.equal(step[name], final[name]) for name in step)


def test_every_verb_takes_it(run, tiny_pairs, tmp_path, capsys):
    last, out = str(run / "last"), str(tmp_path / "out.jsonl")
    pairs = ["--data", str(tiny_pairs), "--max_length", "96"]
    assert main(["score", "--model", last, *pairs, "--output", out]) == 0
    assert len(Path(out).read_text().splitlines()) == 30
    assert main(["evaluate", "--model", last, *pairs, "--json"]) == 0
    assert main(["generate", "--model", last, "--prompt", "a b", "--max_new_tokens", "2"]) == 0
    assert main(["export", "--model", last, "--output", str(tmp_path / "exported")]) == 0
    assert torch.equal(logits(tmp_path / "exported"), logits(last))
    assert main(["plan", "--model", last, "--gpus", "1"]) == 0
    capsys.readouterr()


def test_a_stage_starts_from_it_and_its_reference_is_found_again(
    run, shorter, tiny_pairs, tmp_path
):
    final = dpo(shorter, tiny_pairs, tmp_path / "from_final", max_steps=1)
    again = dpo(run / "last", tiny_pairs, tmp_path / "from_step", max_steps=1)
    assert torch.equal(logits(final), logits(again))


def test_adapters_are_merged_and_named_by_their_base(tmp_path, tiny_checkpoint, tiny_pairs):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    lora = LoraConfig(rank=4, modules_to_save=["lm_head"])
    dpo(tiny_checkpoint, tiny_pairs, tmp_path / "run", lora)
    final = dpo(tiny_checkpoint, tiny_pairs, tmp_path / "shorter", lora, max_steps=2)
    assert inspect_checkpoint(tmp_path / "run" / "last").base == str(tiny_checkpoint)
    torch.testing.assert_close(logits(tmp_path / "run" / "last"), logits(final))
    assert not torch.equal(logits(final), logits(tiny_checkpoint))


def test_experts_too(tmp_path, tiny_checkpoint):
    """In memory a Mixtral's experts have other names and shapes than in its files."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"one two three {i} " * 20 for i in range(40)))
    shape = ModernLLMConfig(
        vocab_size=300, d_model=32, n_layers=2, n_heads=2, max_seq_len=32, use_moe=True,
        moe_config=MoEConfig(num_experts=2, top_k=1),
    )  # fmt: skip
    data = DocumentDatasetConfig(dataset_name=str(text))

    def train(name: str, steps: int) -> Path:
        fields = {"tokenizer_name": str(tiny_checkpoint), "max_steps": steps}
        return run_training(shape, config(tmp_path / name, **fields), data)

    train("run", 3)
    final = train("shorter", 2)
    assert torch.equal(logits(tmp_path / "run" / "last"), logits(final))
    step, whole = content(tmp_path / "run" / "last"), content(final)
    assert step.keys() == whole.keys()
    assert all(torch.equal(step[name], whole[name]) for name in step)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_pieces_of_two_ranks_are_one_model(tmp_path, tiny_checkpoint, tiny_pairs, number, shorter):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    fields = {
        "max_steps": 3, "save_every": 2, "batch_size": 6, "learning_rate": 1e-2,
        "schedule": "constant", "warmup_steps": 0,
    }  # fmt: skip
    case = Case(tmp_path / "run", stage(number), fields, {"max_length": 96})
    run_cases(2, tiny_checkpoint, tiny_pairs, {"run": case})
    step = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert len(list(step.glob("model-*.safetensors"))) == 2
    torch.testing.assert_close(logits(step), logits(shorter), atol=1e-4, rtol=1e-4)
    assert content(step).keys() == content(shorter).keys()


def test_damage_and_a_folder_of_an_older_version_are_one_line(run, tmp_path):
    step = tmp_path / "step-00000002"
    shutil.copytree(run / "checkpoints" / "step-00000002", step)
    weights = step / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        load_model(inspect_checkpoint(step))
    (step / "config.json").unlink()
    with pytest.raises(UserError, match="resume its run once, or give the final model"):
        inspect_checkpoint(step)
