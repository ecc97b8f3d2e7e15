"""DoRA, rsLoRA, chosen layers and adapters of experts: exact reference, resume, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modern_llm.cli import main
from modern_llm.config import LoraConfig
from modern_llm.config.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.zero import stage, use_deepspeed
from tests.training.test_lora import dpo, load, logits, losses

peft = pytest.importorskip("peft", reason="peft is not installed (extra: lora)")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
VARIANTS = {
    "dora": {"rank": 4, "dora": True},
    "rslora": {"rank": 4, "rslora": True, "alpha": 8},
    "layers": {"rank": 4, "layers": [1]},
    "gaussian": {"rank": 4, "initial": "gaussian"},
    "dora and a saved module": {"rank": 4, "dora": True, "modules_to_save": ["lm_head"]},
    "experts": {"rank": 4, "targets": [], "target_parameters": EXPERTS},
    "experts and layers": {"rank": 4, "targets": ["q_proj"], "target_parameters": EXPERTS[1:]},
}
STEPS = {"max_steps": 6}


@dataclass
class Trained:
    """A finished run with its base."""

    final: Path
    base: Path
    lora: LoraConfig


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tiny_tokenizer) -> Path:
    """A tiny mixture of experts with the tokenizer of the other tiny models."""
    import transformers as tf

    place = tmp_path_factory.mktemp("mixture")
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_tokenizer)
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        num_local_experts=4, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, tmp_path_factory, tiny_checkpoint, mixture, tiny_pairs) -> Trained:
    base = mixture if request.param.startswith("experts") else tiny_checkpoint
    lora = LoraConfig(**VARIANTS[request.param])
    folder = tmp_path_factory.mktemp("variant") / "run"
    return Trained(dpo(base, tiny_pairs, folder, lora, **STEPS), base, lora)


@pytest.mark.slow
def test_a_variant_learns_and_its_base_stays(trained):
    found = losses(trained.final.parent)
    assert found[0] == pytest.approx(0.6931, abs=1e-3) and min(found) < found[0]
    base = load(trained.base)
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, trained.final).eval()
    assert float((logits(model) - before).abs().max()) > 1e-4, "it must have learnt"
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.slow
def test_cached_and_live_reference_agree(trained, tiny_pairs, tmp_path):
    live = {"reference": "model"}
    other = dpo(trained.base, tiny_pairs, tmp_path / "live", trained.lora, live, **STEPS)
    assert losses(other.parent) == pytest.approx(losses(trained.final.parent), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_resumes(trained, tiny_pairs, tmp_path):
    with broken_at(4), pytest.raises(KeyboardInterrupt):
        dpo(trained.base, tiny_pairs, tmp_path / "run", trained.lora, **STEPS)
    final = dpo(trained.base, tiny_pairs, tmp_path / "run", trained.lora, **STEPS)
    assert losses(final.parent) == losses(trained.final.parent)


@pytest.mark.slow
def test_merged_exports_of_the_final_model_and_of_a_checkpoint_agree(trained, tmp_path):
    model = peft.PeftModel.from_pretrained(load(trained.base), trained.final).eval()
    expected = logits(model)
    last = trained.final.parent / "checkpoints" / "step-00000006"
    for name, place in (("final", trained.final), ("last", last)):
        if place == last and not last.exists():
            continue
        out = tmp_path / name
        assert main(["export", "--model", str(place), "--output", str(out), "--merge"]) == 0
        assert torch.allclose(logits(load(out)), expected, atol=1e-4), name


def on_a_rank(cases, pairs, folder: Path) -> dict:
    result = {}
    for name, base, lora in cases:
        for kind, content in (("ddp", None), ("zero2", stage(2))):
            use_deepspeed(content, folder)
            place = folder / f"{name}-{kind}"
            dpo(base, pairs, place, lora, **STEPS)
            result[name, kind] = losses(place)
    use_deepspeed(stage(3), folder)
    for name, base, lora in cases:
        with pytest.raises(ConfigError, match="zero2.yaml"):
            dpo(base, pairs, folder / f"{name}-zero3", lora, **STEPS)
    return result


@pytest.mark.slow
def test_on_two_processes(tiny_checkpoint, mixture, tiny_pairs, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    dora, experts = (LoraConfig(**VARIANTS[name]) for name in ("dora", "experts"))
    cases = [("dora", tiny_checkpoint, dora), ("experts", mixture, experts)]
    alone = {
        name: losses(dpo(base, tiny_pairs, tmp_path / f"{name}-alone", lora, **STEPS).parent)
        for name, base, lora in cases
    }
    for seen in run_ranks(on_a_rank, 2, cases, tiny_pairs, tmp_path, timeout=250):
        for (name, kind), found in seen.items():
            assert found == pytest.approx(alone[name], rel=1e-4), (name, kind)


@pytest.mark.slow
def test_scale_and_layers_are_those_of_the_configuration(trained):
    settings = peft.PeftConfig.from_pretrained(trained.final)
    lora = trained.lora
    assert (settings.use_dora, settings.use_rslora) == (lora.dora, lora.rslora)
    assert settings.layers_to_transform == lora.layers
    assert sorted(settings.target_parameters or []) == sorted(lora.target_parameters)


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"layers": [0, 99]}, "lora.layers: 99 is no layer of this model: 0 to"),
        (
            {"target_parameters": ["experts.up"]},
            "no parameter of this model ends with 'experts.up'",
        ),
    ],
)
def test_names_that_the_model_lacks_are_refused(
    lora, sentence, tiny_checkpoint, tiny_pairs, tmp_path
):
    with pytest.raises(ConfigError, match=sentence):
        dpo(tiny_checkpoint, tiny_pairs, tmp_path / "run", lora=LoraConfig(**lora))


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ({"layers": []}, "name at least one, or leave it out"),
        ({"target_parameters": EXPERTS, "dora": True}, "cannot be combined with dora"),
        ({"target_parameters": EXPERTS, "dropout": 0.1}, "cannot be combined with dropout"),
        ({"initial": "pissa_niter_4"}, "pissa_niter_4 changes the frozen weights, so that"),
        ({"initial": "eva"}, "eva reads activations of the data before the first step"),
        ({"initial": "orthogonal"}, "orthogonal depends on a decomposition"),
    ],
)
def test_contradictions_are_refused(lora, sentence):
    with pytest.raises(ValueError, match=sentence):
        LoraConfig(**lora)
