"""Weights that are read one by one are those of the model that is read at once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modern_llm.config import LoraConfig, ModernLLMConfig, MoEConfig
from modern_llm.config.errors import UserError
from modern_llm.models import pt_checkpoint
from modern_llm.models.adapters import add_adapters
from modern_llm.models.build import build_model
from modern_llm.models.build_later import build_model_later
from modern_llm.models.load import Checkpoint, inspect_checkpoint, load_model, make_scorer
from modern_llm.models.load_later import CannotWait, load_model_later
from modern_llm.models.training_mode import dropouts
from modern_llm.models.unread import first_layers, has_unread
from tests.helpers.families import UNBUILT, build_family

SHAPE = {
    "vocab_size": 300, "d_model": 32, "n_layers": 4, "n_heads": 4, "use_gqa": True,
    "gqa_groups": 2, "max_seq_len": 256, "initializer_range": 0.1, "dropout": 0.1,
}  # fmt: skip
KINDS = {
    "tied": {"tie_embeddings": True},
    "apart": {"tie_embeddings": False, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "experts": {"use_moe": True, "moe_config": MoEConfig(num_experts=12, top_k=2)},
}


def shape(kind: str) -> ModernLLMConfig:
    return ModernLLMConfig(**(SHAPE | KINDS[kind]))


def must_be_same(later: PreTrainedModel, model: PreTrainedModel) -> None:
    """Compare every bit of what is read with the weights of `model`, and all buffers."""
    found = dict(later.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert found[name].shape == parameter.shape and found[name].dtype == torch.float32
        assert found[name].untyped_storage().nbytes() == 4, "a placeholder has no memory"
        assert torch.equal(found[name].unread().float(), parameter.data), name
    buffers = dict(later.named_buffers())
    assert set(buffers) == {name for name, _ in model.named_buffers()}
    for name, buffer in model.named_buffers():
        assert buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer), name
    assert later.training == model.training
    assert later.generation_config.to_dict() == model.generation_config.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_new_models_draw_the_same_weights_in_any_order(kind):
    model, later = build_model(shape(kind), seed=5), build_model_later(shape(kind), seed=5)
    state = torch.get_rng_state()
    for name, parameter in reversed(list(later.named_parameters())):
        assert torch.equal(parameter.unread(), model.get_parameter(name)), name
    must_be_same(later.train(), model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["one file", "parts", "bfloat16", "bin", "pt"])
def test_checkpoints(tmp_path, kind, form):
    model, place = build_model(shape(kind), seed=5), tmp_path / "model"
    if form == "bfloat16":
        model.to(torch.bfloat16)
    if form == "pt":
        place = tmp_path / "model.pt"
        pt_checkpoint.save_model(place, shape(kind), model)
    else:
        model.save_pretrained(place, max_shard_size="40KB" if form == "parts" else "5GB")
    if form == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
        (place / "model.safetensors").unlink()
    later = load_model_later(inspect_checkpoint(place))
    must_be_same(later.eval(), load_model(place).eval())


@pytest.mark.parametrize("differ", [False, True])
def test_weights_under_both_names_of_a_tie(tmp_path, differ):
    model = build_model(shape("tied"), seed=5)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + differ
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not differ:
        must_be_same(load_model_later(inspect_checkpoint(tmp_path)), load_model(tmp_path))
        return
    # `transformers` does not tie them then.
    with pytest.raises(CannotWait, match=r"tied and have different values"):
        load_model_later(inspect_checkpoint(tmp_path))


def test_what_cannot_be_read_one_by_one_is_refused_with_a_reason(tmp_path):
    build_model(shape("apart"), seed=5).save_pretrained(tmp_path / "a")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "a" / "model.safetensors"
    stored = load_file(file)
    del stored["lm_head.weight"]
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CannotWait, match=r"lm_head\.weight is missing"):
        load_model_later(inspect_checkpoint(tmp_path / "a"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CannotWait, match=r"model\.safetensors"):
        load_model_later(inspect_checkpoint(tmp_path / "a"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [True, False])
def test_the_first_layers_are_measured_in_place_of_the_model(kind, dropout):
    model, later = build_model(shape(kind), seed=5), build_model_later(shape(kind), seed=5)
    expected = make_scorer(model, dropout=dropout)
    first = first_layers(later)
    assert first.config.num_hidden_layers == 2 and not has_unread(first)
    found = make_scorer(later, measured=first, dropout=dropout)
    assert found.capabilities == expected.capabilities
    for parameter in later.parameters():
        parameter.data = parameter.unread()
    for one, other in zip(later.modules(), model.modules(), strict=True):
        assert type(one) is type(other)
        assert ("forward" in vars(one)) == ("forward" in vars(other)), type(one)
    assert [rate for _, rate in dropouts(later)] == [rate for _, rate in dropouts(model)]
    assert later.config._attn_implementation == model.config._attn_implementation
    ids = torch.arange(3, 27).view(2, 12)
    inputs = (
        ids, torch.arange(12).expand(2, 12), torch.zeros(2, 12, 2, dtype=torch.long),
        torch.tensor([[1, 5, 15], [7, 8, 9]]),
    )  # fmt: skip
    inputs[2][..., 0] = torch.arange(2)[:, None]
    assert torch.equal(found.eval()(*inputs).logprobs, expected.eval()(*inputs).logprobs)


def test_adapters_and_copies_of_whole_modules_keep_their_weights(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    model, place = build_model(shape("apart"), seed=5), tmp_path / "model"
    model.save_pretrained(place)
    options = LoraConfig(rank=2, modules_to_save=["lm_head"])
    later = load_model_later(inspect_checkpoint(place))
    for each in (model, later):
        add_adapters(each, options, str(place), seed=3)
    for (name, one), (other_name, other) in zip(
        later.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other_name and one.requires_grad == other.requires_grad
        assert hasattr(one, "unread") == ("lora_" not in name), name
        assert torch.equal(one.unread() if hasattr(one, "unread") else one, other), name


@pytest.mark.slow
def test_every_family(tmp_path):
    """Each is read one by one; buffers and converted names are those of `load_model`."""
    refused = {}
    for number, family in enumerate(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        if family in UNBUILT:
            continue
        place = tmp_path / str(number)
        build_family(family).save_pretrained(place)
        checkpoint = Checkpoint(str(place), AutoConfig.from_pretrained(place), False)
        try:
            whole = load_model(checkpoint)
        except UserError:
            continue
        try:
            later = load_model_later(checkpoint)
        except CannotWait as reason:
            refused[family] = str(reason)
            continue
        must_be_same(later, whole)
    # These are read whole.
    assert set(refused) <= {"blt", "hrm_text", "longcat_flash", "prophetnet", "xlstm", "zamba"}
