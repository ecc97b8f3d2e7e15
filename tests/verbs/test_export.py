"""`export`: every form loads with the same weights; the card says what was done; nothing is pushed
unasked."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from modern_llm.cli import main
from modern_llm.models.load import inspect_checkpoint, load_model


def weights(place) -> dict[str, torch.Tensor]:
    return load_model(inspect_checkpoint(str(place))).state_dict()


def same(first, second) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_export(*words) -> int:
    return main(["export", *map(str, words)])


def test_a_folder_to_a_pt_file_and_back_is_the_same_model(place, tmp_path, capsys):
    pt, back = tmp_path / "new" / "m.pt", tmp_path / "back"
    assert run_export("--model", place / "model", "--output", pt, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    assert result["parameters"] == model.num_parameters() and not result["merged"]
    content = torch.load(pt, weights_only=True)
    assert set(content) == {"config", "model_state"} and content["config"]["gqa_groups"] == 2
    assert same(pt, place / "model")
    words = ["--model", pt, "--output", back, "--tokenizer_name", place / "model"]
    assert run_export(*words) == 0
    assert same(back, place / "model")
    AutoTokenizer.from_pretrained(back)


def test_another_dtype_is_that_rounding(place, tmp_path):
    assert (
        run_export("--model", place / "model", "--output", tmp_path / "b", "--dtype", "bfloat16")
        == 0
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert loaded.dtype == torch.bfloat16
    whole = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    assert all(torch.equal(v, whole[n].bfloat16()) for n, v in loaded.state_dict().items())


def test_an_adapter_is_merged_into_its_base(place, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 30, 7]])
    expected = model(ids).logits
    words = ["--model", tmp_path / "adapter", "--output", tmp_path / "merged", "--json"]
    assert run_export(*words) == 2 and "set merge" in capsys.readouterr().err
    assert run_export(*words, "--merge") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["merged"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


@pytest.fixture
def trained(run_file, tmp_path) -> Path:
    file = run_file(data={"eval_fraction": 0.2})
    assert main(["dpo", "--config", str(file)]) == 0
    return tmp_path / "out" / "a_final"


@pytest.mark.parametrize("kind", ["none", "pipe", "folder", "link"])
def test_a_model_beside_what_is_no_run_is_exported_without_a_card(kind, place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "other" / "model")
    (tmp_path / "other" / "config.yaml").write_text("a: 1")
    log = tmp_path / "other" / "metrics.jsonl"
    if kind == "pipe":
        os.mkfifo(log)
    elif kind == "folder":
        log.mkdir()
    elif kind == "link":
        (tmp_path / "log").write_text('{"step": 1}\n')
        log.symlink_to(tmp_path / "log")
    assert run_export("--model", tmp_path / "other" / "model", "--output", tmp_path / "x") == 0
    assert (tmp_path / "x" / "config.json").is_file() and not (
        tmp_path / "x" / "README.md"
    ).exists()


def test_the_card_states_data_configuration_metrics_and_versions(trained, tmp_path):
    assert run_export("--model", trained, "--output", tmp_path / "x") == 0
    card = (tmp_path / "x" / "README.md").read_text()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for part in (
        "library_name: transformers", "- dpo", "pairs.jsonl`: 60 rows, 60 kept (hh)",
        f"| evaluation accuracy | {records[-1]['eval/rewards/accuracies']:.1%} |",
        f"| loss | {records[-1]['loss']:.4f} |", "dpo.beta: 0.1", f"- torch: {version('torch')}",
        "3 optimizer steps",
    ):  # fmt: skip
        assert part in card, part
    assert "base_model" not in card  # a folder of this machine says nothing to others
    from huggingface_hub import ModelCard

    assert ModelCard.load(tmp_path / "x" / "README.md").data.pipeline_tag == "text-generation"


def test_nothing_is_pushed_unless_a_repository_is_named(trained, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo",
        lambda self, name, **o: calls.append((name, o["private"])) or f"https://hub/{name}",
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, **o: calls.append(sorted(p.name for p in Path(o["folder_path"]).iterdir())),
    )
    assert run_export("--model", trained, "--output", tmp_path / "x") == 0
    assert calls == []
    words = ["--model", trained, "--output", tmp_path / "y", "--push_to_hub", "me/m", "--json"]
    assert run_export(*words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pushed_to"] == "https://hub/me/m"
    assert calls[0] == ("me/m", True)
    assert {"README.md", "config.json", "model.safetensors"} <= set(calls[1])


def test_a_push_that_fails_says_where_the_export_is(place, tmp_path, monkeypatch, capsys):
    def refuse(self, *names, **options):
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    words = ["--model", place / "model", "--output", tmp_path / "x", "--push_to_hub", "me/m"]
    assert run_export(*words) == 2
    err = capsys.readouterr().err
    assert "no route" in err and str(tmp_path / "x") in err
    assert (tmp_path / "x" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "no/such", "--output", "x"], "no/such"),
        (["--model", "no/such", "--output", "."], "exists already"),
        (["--model", "m", "--output", "x.pt", "--push_to_hub", "a/b"], "output is a .pt file"),
        (["--model", "m", "--output", "x", "--public"], "public has no effect"),
        (["--model", "m", "--output", "x", "--dtype", "int8"], "int8"),
    ],
)
def test_bad_usage_is_one_line(words, part, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_export(*words) == 2
    assert part in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pt_file_refuses_what_it_cannot_say(place, tmp_path, capsys):
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    assert run_export("--model", tmp_path / "gpt2", "--output", tmp_path / "g.pt") == 2
    assert "a .pt file can hold Llama and Mixtral, not gpt2" in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    model.config.attention_bias = True
    AutoModelForCausalLM.from_config(model.config).save_pretrained(tmp_path / "biased")
    assert run_export("--model", tmp_path / "biased", "--output", tmp_path / "b.pt") == 2
    assert "cannot represent attention_bias True" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pt"))
