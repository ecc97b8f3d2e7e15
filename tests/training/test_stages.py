"""The documented Python API: three stages in sequence, from every form of checkpoint."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm.config import ModernLLMConfig, TrainingConfig
from modern_llm.config.errors import StorageError, UserError
from modern_llm.data.instruction_datasets import InstructionDatasetConfig
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.models import pt_checkpoint
from modern_llm.models.build import build_model
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft
from tests.helpers.text import WORDS, make_checkpoint, transcripts, write_jsonl


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def config(folder: Path, **changes) -> TrainingConfig:
    fields = {
        "run_name": "t", "output_dir": folder, "batch_size": 4, "max_steps": 3, "log_every": 1,
        "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainingConfig(**(fields | changes))


def test_the_three_stages_chain_as_documented(tmp_path, tiny_tokenizer, tiny_pairs):
    text = tmp_path / "documents.txt"
    text.write_text("\n\n".join(" ".join(WORDS) + f" {i}" for i in range(40)), encoding="utf-8")
    rows = [{"instruction": f"say {w}", "input": "", "output": f"{w} {w}"} for w in WORDS]
    alpaca = tmp_path / "alpaca.json"
    alpaca.write_text(json.dumps(rows), encoding="utf-8")
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_tokenizer))

    final = run_dpo(
        sft_checkpoint=run_sft(
            pretrain_checkpoint=run_training(
                ModernLLMConfig(
                    vocab_size=vocabulary, d_model=32, n_layers=2, n_heads=4, max_seq_len=128
                ),
                config(
                    tmp_path / "pretrain",
                    dataset_name=str(text),
                    tokenizer_name=str(tiny_tokenizer),
                    learning_rate=1e-2,
                    max_steps=12,
                ),
            ),
            train_config=config(tmp_path / "sft", max_steps=None, epochs=2),
            dataset_config=InstructionDatasetConfig(dataset_name=str(alpaca), eval_fraction=0.2),
        ),
        train_config=config(tmp_path / "dpo", run_name="dpo-hh", learning_rate=3e-3, max_steps=9),
        dpo_config=DPOConfig(max_length=96),
        preference_config=PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
    )

    assert final == tmp_path / "dpo" / "dpo-hh_final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    assert (final / "model.safetensors").is_file()
    pretrain, sft, dpo = (records(tmp_path / name) for name in ("pretrain", "sft", "dpo"))
    assert pretrain[-1]["loss"] < pretrain[0]["loss"] - 0.3
    assert sft[-1]["loss"] < sft[0]["loss"]
    assert "eval/perplexity" in sft[-1]
    assert dpo[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert dpo[0]["ties"] + dpo[0]["rewards/accuracies"] <= 1
    assert min(r["loss"] for r in dpo[-4:]) < 0.69
    for row in (*pretrain, *sft, *dpo):
        assert {"step", "elapsed_s", "examples", "loss", "grad_norm", "lr", "tokens_per_second",
                "memory_gb"} <= set(row)  # fmt: skip
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen",
            "logps/rejected"} <= set(dpo[0])  # fmt: skip
    assert json.loads((tmp_path / "dpo" / "outcome.json").read_text())["status"] == 0
    assert "dpo-hh" in (tmp_path / "dpo" / "report.html").read_text(encoding="utf-8")
    written = yaml.safe_load((tmp_path / "dpo" / "config.yaml").read_text())
    assert {"sft_checkpoint", "train", "dpo", "data"} <= set(written)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs_as_written(
    tmp_path, tiny_checkpoint, tiny_pairs, capsys
):
    train_config = TrainingConfig(
        run_name="dpo-hh", dataset_name=str(tiny_pairs), tokenizer_name=str(tiny_checkpoint),
        output_dir=tmp_path / "dpo", batch_size=16, micro_batch_size=1,
        gradient_accumulation_steps=16, learning_rate=5e-6, max_steps=2, warmup_steps=1,
        weight_decay=0.01, eval_every=200, save_every=500, log_every=25, mixed_precision="bf16",
    )  # fmt: skip
    dpo_config = DPOConfig(beta=0.1, max_length=512, label_smoothing=0.0)
    assert dpo_config == DPOConfig()
    checkpoint = make_checkpoint(tmp_path / "long", tiny_checkpoint, max_seq_len=512)
    final = run_dpo(
        checkpoint,
        train_config,
        dpo_config,
        PreferenceDatasetConfig(dataset_name=str(tiny_pairs), split="train"),
        tokenizer_name=None,
    )
    assert (final / "config.json").is_file()
    line = [text for text in capsys.readouterr().out.splitlines() if text.startswith("step=2 ")]
    assert line and " accuracy=" in line[0] and "% lr=" in line[0]


def test_pt_folder_and_sharded_folder_give_the_same_run_and_the_same_reference(
    tmp_path, tiny_tokenizer, tiny_pairs, caplog
):
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_tokenizer))
    shape = ModernLLMConfig(
        vocab_size=vocabulary, d_model=32, n_layers=2, n_heads=4, max_seq_len=256
    )
    model = build_model(shape, seed=3)
    pt_checkpoint.save_model(tmp_path / "model.pt", shape, model)
    model.save_pretrained(tmp_path / "folder")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    losses, scored = [], []
    for name in ("model.pt", "folder", "sharded"):
        with caplog.at_level(logging.INFO, logger="modern_llm"):
            caplog.clear()
            run_dpo(
                str(tmp_path / name),
                config(tmp_path / f"run-{name}", tokenizer_name=str(tiny_tokenizer)),
                DPOConfig(max_length=96),
                PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
            )
        losses.append([r["loss"] for r in records(tmp_path / f"run-{name}")])
        scored += [r.message for r in caplog.records if "reference pass" in r.message]
    assert losses[0] == losses[1] == losses[2]
    assert "scored 60 " in scored[0]
    assert "scored 0 " in scored[1] and "scored 0 " in scored[2]


def test_router_loss_is_logged_apart_and_the_loss_begins_at_ln_2(
    tmp_path, tiny_tokenizer, tiny_pairs
):
    checkpoint = make_checkpoint(
        tmp_path / "moe", tiny_tokenizer, use_moe=True, ffn_hidden_size=32,
        moe_config={"num_experts": 4, "top_k": 2, "aux_loss_coefficient": 0.5},
    )  # fmt: skip
    norms = {}
    for name, option in {"own": {}, "same": {"router_loss_coefficient": 0.5},
                         "off": {"router_loss_coefficient": 0.0}}.items():  # fmt: skip
        run_dpo(
            checkpoint,
            config(tmp_path / name, **option),
            DPOConfig(max_length=96),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
        first = records(tmp_path / name)[0]
        assert first["loss"] == pytest.approx(0.6931, abs=2e-4)
        norms[name] = first["grad_norm"]
        # Even routing has a load-balancing loss of top_k = 2 in transformers' form, the minimum.
        assert ("aux_loss" in first) == (name != "off")
        assert first.get("aux_loss", 2.0) > 1.9
    assert norms["own"] == norms["same"] != norms["off"]


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "simpo", "orpo", "dpop", "ipo"])
def test_losses_do_not_depend_on_micro_batches(tmp_path, tiny_checkpoint, tiny_pairs, loss_type):
    seen = []
    for name, settings in {
        "one": {"micro_batch_size": 1},
        "all": {"tokens_per_micro_batch": 100_000},
    }.items():
        run_dpo(
            tiny_checkpoint,
            config(tmp_path / name, batch_size=7, max_steps=5, **settings),
            DPOConfig(max_length=96, loss_type=loss_type, beta=0.3),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
        seen.append([(r["loss"], r["grad_norm"]) for r in records(tmp_path / name)])
    assert torch.tensor(seen[0]).allclose(torch.tensor(seen[1]), rtol=2e-4, atol=1e-5)
    assert seen[0][0] != seen[0][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "backend"),
    [
        ({"gradient_checkpointing": True}, None),
        ({"gradient_checkpointing": "selective"}, None),
        ({"gradient_checkpointing": True, "mlp_chunk": 7}, None),
        ({"mlp_chunk": 7}, None),
        ({"compile": True}, "aot_eager"),
        ({"compile": True, "gradient_checkpointing": "selective"}, "aot_eager"),
        # The C++ compiler takes two minutes on two cores; the graphs are the same.
        pytest.param({"compile": True}, "inductor", marks=pytest.mark.long),
    ],
)
def test_recomputation_and_compilation_change_no_number(
    tmp_path, tiny_checkpoint, tiny_pairs, option, backend, monkeypatch
):
    compiled = []

    def compile_with_backend(self, **options):
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_with_backend)
    losses = []
    for name, extra in {"plain": {}, "with": option}.items():
        run_dpo(
            tiny_checkpoint,
            config(tmp_path / name, **extra),
            DPOConfig(max_length=96),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
        losses.append([(r["loss"], r["grad_norm"]) for r in records(tmp_path / name)])
    assert torch.tensor(losses[0]).allclose(torch.tensor(losses[1]), rtol=1e-4)
    assert compiled == (["LlamaDecoderLayer"] * 2 if backend else [])


def test_bf16_stays_close_to_float32(tmp_path, tiny_checkpoint, tiny_pairs):
    losses = []
    for precision in ("fp32", "bf16"):
        run_dpo(
            tiny_checkpoint,
            config(tmp_path / precision, mixed_precision=precision, max_steps=6),
            DPOConfig(max_length=96),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
        losses.append([r["loss"] for r in records(tmp_path / precision)])
    assert losses[0] != losses[1]
    assert torch.tensor(losses[0]).allclose(torch.tensor(losses[1]), atol=0.03)


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_weights_are_read(
    tmp_path, tiny_tokenizer, tiny_pairs, monkeypatch
):
    checkpoint = make_checkpoint(tmp_path / "small", tiny_tokenizer, vocab_size=200)
    monkeypatch.setattr("modern_llm.setup.policy.load_to_shard", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=r"jsonl:1: token id 2\d\d .*embedding has 200 rows"):
        run_dpo(
            checkpoint,
            config(tmp_path / "dpo"),
            DPOConfig(max_length=96),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )


def test_two_tokenizers_that_disagree_on_the_data_are_refused(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    from tests.helpers.text import make_tokenizer

    other = make_tokenizer(tmp_path / "other", vocabulary=270)
    with pytest.raises(UserError, match="tokenizer"):
        run_dpo(
            tiny_checkpoint,
            config(tmp_path / "dpo", tokenizer_name=str(other)),
            DPOConfig(max_length=96),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
    assert not (tmp_path / "dpo").exists()


@pytest.mark.parametrize(
    ("changes", "dpo", "message"),
    [
        ({"batch_size": 31}, {}, "30 examples .* fewer than one batch"),
        ({}, {"max_length": 512}, "512 is above the 256 positions"),
        ({"dataset_name": "elsewhere.jsonl"}, {}, "name different data"),
        ({"tokens_per_micro_batch": 40}, {}, r"pairs.jsonl:\d+: takes \d+ tokens"),
    ],
)
def test_impossible_settings_are_refused(
    tmp_path, tiny_checkpoint, tiny_pairs, changes, dpo, message
):
    with pytest.raises(UserError, match=message):
        run_dpo(
            tiny_checkpoint,
            config(tmp_path / "dpo", **changes),
            DPOConfig(**({"max_length": 96} | dpo)),
            PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
        )
    assert not (tmp_path / "dpo").exists()


def test_the_pairs_on_disk_decide_not_their_order(tmp_path, tiny_checkpoint, caplog):
    """Data that was reordered, reduced or edited: only new answers are scored."""
    rows = transcripts(20, seed=5)
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1][:15])
    edited = [dict(row) for row in rows]
    edited[3]["chosen"] += " more"
    write_jsonl(tmp_path / "c.jsonl", edited)
    scored = {}
    for name in "abc":
        with caplog.at_level(logging.INFO, logger="modern_llm"):
            caplog.clear()
            run_dpo(
                tiny_checkpoint,
                config(tmp_path / name, learning_rate=1e-3 / (1 + ord(name)), batch_size=5),
                DPOConfig(max_length=200, beta=0.1 * ord(name)),
                PreferenceDatasetConfig(dataset_name=str(tmp_path / f"{name}.jsonl")),
            )
        scored[name] = next(r.message for r in caplog.records if "reference pass" in r.message)
    assert "scored 40 " in scored["a"]
    assert "scored 0 " in scored["b"] and "nothing was computed" in scored["b"]
    # Of the edited pair only the new answer is scored.
    assert "found 39, scored 1 " in scored["c"]


def test_stored_values_of_other_weights_stop_the_run(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    """The self-check: the store holds values of another model under this reference's name."""
    from modern_llm.reference.store import store

    append = store.ReferenceStore.append

    def append_wrong(self, entries):
        sums = entries.sums.copy()
        sums[:1] += 0.01
        append(self, dataclasses.replace(entries, sums=sums))

    data = PreferenceDatasetConfig(dataset_name=str(tiny_pairs))
    # The check compares log-probs: with so small a beta the loss would change by only 3e-4.
    options = DPOConfig(max_length=96, self_check_pairs=30, beta=1e-4)
    monkeypatch.setattr(store.ReferenceStore, "append", append_wrong)
    for name in "ab":  # in the launch that scored them, and in a later one that found them
        with pytest.raises(
            StorageError, match=r"pairs.jsonl:\d+: .* nats per token apart .*; remove "
        ):
            run_dpo(tiny_checkpoint, config(tmp_path / name), options, data)
        assert not (tmp_path / name).exists()


def test_a_published_generation_configuration_does_not_break_the_export(
    tmp_path, tiny_checkpoint, tiny_pairs
):
    import shutil

    folder = tmp_path / "vicuna"
    shutil.copytree(tiny_checkpoint, folder)
    settings = {"temperature": 0.9, "top_p": 0.6, "max_length": 200}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    final = run_dpo(
        folder,
        config(tmp_path / "dpo"),
        DPOConfig(max_length=96),
        PreferenceDatasetConfig(dataset_name=str(tiny_pairs)),
    )
    written = json.loads((final / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"]) == (0.9, 0.6)


def test_generation_writes_prompts_and_ends_answers_as_training_did(tmp_path, tiny_checkpoint):
    """Messages without a chat template of the tokenizer: the one used is saved with the model."""
    from modern_llm.data.table.build import prepare_tables
    from modern_llm.inference.chat import prompt_ids

    rows = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": f"{w} {w}"}]}
        for w in WORDS
    ]
    data = InstructionDatasetConfig(
        dataset_name=str(write_jsonl(tmp_path / "chat.jsonl", rows)), max_length=64
    )
    final = run_sft(tiny_checkpoint, config(tmp_path / "sft"), data)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template
    table = prepare_tables(
        data, AutoTokenizer.from_pretrained(tiny_checkpoint), tmp_path / "t", max_length=64
    ).train
    ids, ends = prompt_ids(tokenizer, [WORDS[0], WORDS[5]], "chat")
    assert ids == [table.ids(0, "prompt").tolist(), table.ids(5, "prompt").tolist()]
    assert table.ids(0, "response")[-1] in ends


def test_settings_may_change_until_the_first_checkpoint(tmp_path, tiny_checkpoint, tiny_pairs):
    data = PreferenceDatasetConfig(dataset_name=str(tiny_pairs))
    folder = tmp_path / "dpo"
    with pytest.raises(UserError, match="warmup_steps 5 is above the 3 steps"):
        run_dpo(
            tiny_checkpoint,
            config(folder, max_steps=None, epochs=0.4, warmup_steps=5),
            DPOConfig(max_length=96),
            data,
        )
    final = run_dpo(tiny_checkpoint, config(folder), DPOConfig(max_length=96), data)
    assert (final / "config.json").is_file()
