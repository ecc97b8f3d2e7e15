"""Checkpoints of every form load exactly, and everything else is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modern_llm.config import ModernLLMConfig
from modern_llm.config.errors import StorageError, UserError
from modern_llm.models import pt_checkpoint
from modern_llm.models.build import build_model, to_transformers_config
from modern_llm.models.load import (
    check_id,
    inspect_checkpoint,
    load_model,
    load_tokenizer,
    outside_note,
)
from tests.helpers.text import make_checkpoint, make_tokenizer

SHAPE = ModernLLMConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pt(tmp_path):
    model = build_model(SHAPE, seed=1)
    pt_checkpoint.save_model(tmp_path / "model.pt", SHAPE, model)
    return tmp_path / "model.pt", model


def equal(a, b):
    one, two = dict(a.named_parameters()), dict(b.named_parameters())
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_a_pt_file_gives_its_model(pt):
    path, model = pt
    checkpoint = inspect_checkpoint(path)
    assert (checkpoint.vocabulary, checkpoint.positions) == (64, 64)
    assert not checkpoint.has_tokenizer
    assert equal(load_model(checkpoint), model)


@pytest.mark.parametrize("form", ["prefixed", "legacy", "bfloat16"])
def test_other_ways_of_writing_the_same_pt_file(pt, tmp_path, form):
    path, model = pt
    content = torch.load(path, weights_only=True)
    if form == "prefixed":
        content["model_state"] = {f"module.{n}": t for n, t in content["model_state"].items()}
    if form == "bfloat16":
        content["model_state"] = {n: t.bfloat16() for n, t in content["model_state"].items()}
        model.to(torch.bfloat16).float()
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=form != "legacy")
    loaded = load_model(inspect_checkpoint(tmp_path / "m.pt"))
    assert loaded.dtype == torch.float32
    assert equal(loaded, model)


def test_a_planted_payload_is_not_executed(tmp_path):
    content = {"config": {"vocab_size": 64}, "model_state": Payload(tmp_path / "executed")}
    torch.save(content, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="nothing in it was executed"):
        inspect_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("config"), "needs the keys config and model_state"),
        (lambda c: c["config"].update(d_model=33), "not divisible"),
        (lambda c: c["config"].update(colour=3), "colour"),
        (lambda c: c["model_state"].pop("model.norm.weight"), "is missing"),
        (lambda c: c["model_state"].update(extra=torch.ones(1)), "extra is unknown"),
        (
            lambda c: c["model_state"].update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight has shape \(3,\), expected \(32,\)",
        ),
    ],
)
def test_a_pt_file_that_does_not_fit_is_refused(pt, tmp_path, change, message):
    content = torch.load(pt[0], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match=message):
        load_model(inspect_checkpoint(tmp_path / "m.pt"))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04broken"])
def test_garbage_is_refused_as_a_pt_file(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"m\.pt"):
        inspect_checkpoint(tmp_path / "m.pt")


def test_a_folder_without_all_weights_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="up_proj"):
        load_model(inspect_checkpoint(folder))


def test_damaged_or_missing_weights_are_one_sentence(tmp_path):
    folder = make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match="damaged weights"):
        load_model(inspect_checkpoint(folder))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(inspect_checkpoint(folder))
    (folder / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(UserError, match="no causal language model of type t5"):
        inspect_checkpoint(folder)


def test_rotary_scaling_reaches_the_model():
    scaled = ModernLLMConfig(
        vocab_size=64, d_model=32, n_heads=4, rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    parameters = to_transformers_config(scaled).rope_parameters
    assert parameters == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}


def test_an_error_about_a_missing_checkpoint_lists_the_accepted_forms(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        inspect_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UserError, match="check the path or the id"):
        inspect_checkpoint("nobody/nothing")
    with pytest.raises(UserError, match="tokenizer_name"):
        load_tokenizer(tmp_path)


def test_remote_code_is_not_run(tmp_path):
    folder = make_checkpoint(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.X", "AutoModelForCausalLM": "evil.Y"}}
    (folder / "config.json").write_text(json.dumps(config))
    load_model(inspect_checkpoint(folder))
    assert not (tmp_path / "executed").exists()


def test_ids_outside_the_embedding_are_named(tmp_path):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    assert outside_note(tokenizer, len(tokenizer)) is None
    note = outside_note(tokenizer, 298)
    assert note is not None and note.startswith("2 of the tokenizer's ids are outside")
    check_id(299, 300, tokenizer, "a.jsonl:3")
    with pytest.raises(UserError, match=r"a.jsonl:3: token id 299 \('.*'\) but embedding has 299"):
        check_id(299, 299, tokenizer, "a.jsonl:3")


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ({}, "LlamaForCausalLM"),
        ({"use_gqa": True, "gqa_groups": 2}, "LlamaForCausalLM"),
        ({"use_moe": True, "moe_config": {"num_experts": 4}}, "MixtralForCausalLM"),
    ],
)
def test_our_own_shapes_are_stock_architectures(shape, kind):
    fields = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "dropout": 0.1}
    config = ModernLLMConfig(**(fields | shape))
    model = build_model(config, seed=3)
    assert type(model).__name__ == kind
    stock = to_transformers_config(config)
    assert stock.attention_dropout == 0.1
    assert stock.num_key_value_heads == (2 if shape.get("use_gqa") else 4)
    assert stock.intermediate_size == config.ffn_width == 96
    assert equal(model, build_model(config, seed=3))
    assert not equal(model, build_model(config, seed=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_attention_sinks": True}, "no stock Llama or Mixtral has attention sinks"),
        ({"use_rope": False}, "rotary"),
        ({"use_swiglu": False}, "SwiGLU"),
        ({"d_model": 30}, "not divisible"),
        ({"gqa_groups": 2}, "no effect without use_gqa"),
        ({"use_gqa": True, "gqa_groups": 3}, "does not divide"),
        ({"use_moe": True, "moe_config": {"capacity_factor": 1.25}}, "capacity"),
        ({"moe_config": {}}, "no effect without use_moe"),
        ({"d_modle": 3}, "d_modle"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type is the old name"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"rope_type": "linaer", "factor": 2.0}}, "one of linear"),
    ],
)
def test_a_shape_that_no_stock_architecture_has_is_refused(change, message):
    fields = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}
    with pytest.raises(ValueError, match=message):
        ModernLLMConfig(**(fields | change))


def anonymous_bytes() -> int:
    """Return the memory of this process that is not backed by a file."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="tells memory on Linux")
def test_weights_in_their_stored_dtype_are_mapped_from_the_files(tmp_path):
    shape = dataclasses.replace(SHAPE, vocab_size=4096, d_model=512, ffn_hidden_size=2048)
    stored = build_model(shape, seed=1).to(torch.bfloat16)
    stored.save_pretrained(tmp_path)
    checkpoint = inspect_checkpoint(tmp_path)
    size = sum(p.numel() for p in stored.parameters())
    before = anonymous_bytes()
    model = load_model(checkpoint, as_stored=True)
    mapped = anonymous_bytes() - before
    assert model.dtype == torch.bfloat16 and equal(model, stored)
    widened = load_model(checkpoint)
    copied = anonymous_bytes() - before - mapped
    assert widened.dtype == torch.float32
    assert mapped < 0.2 * 2 * size < 4 * size < 1.2 * copied, "a copy was made"


@pytest.mark.parametrize("place", ["./chat-modl", "../nothing/here", "/no/such/model"])
def test_a_path_to_nothing_is_not_looked_for_on_the_hub(place):
    with pytest.raises(UserError, match="no such folder or file; check the path"):
        inspect_checkpoint(place)
