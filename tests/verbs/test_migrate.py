"""`modern-llm migrate`: configurations of other trainers become ours, and no option is lost."""

from __future__ import annotations

import json

import pytest
import yaml

from modern_llm.cli import main
from modern_llm.verbs.settings import read_settings
from modern_llm.verbs.stage_settings import DpoSettings
from modern_llm.verbs.stages import read_stage

AXOLOTL = """\
base_model: some/model
model_type: LlamaForCausalLM
rl: dpo
rl_beta: 0.2
datasets:
  - {path: some/pairs, type: chatml.intel, split: "train[:90%]", field_chosen: best}
val_set_size: 0.05
sequence_len: 2048
sample_packing: false
adapter: lora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
fp16: false
gradient_checkpointing: true
logging_steps: 1
warmup_ratio: 0.1
evals_per_epoch: 4
weight_decay: 0.0
wandb_project: mine
early_stopping_patience: 3
wandb_entity:
special_tokens: {pad_token: "<pad>"}
trust_remote_code: true
output_dir: ./out
"""
LLAMA_FACTORY = """\
model_name_or_path: some/model
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj, v_proj
dataset: first, second
template: llama3
cutoff_len: 1024
val_size: 0.1
output_dir: out/sft
logging_steps: 10
save_steps: 500
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
TRL_YAML = """\
model_name_or_path: some/model
dataset_name: some/pairs
dataset_test_split: validation
eval_strategy: steps
eval_steps: 50
beta: 0.05
loss_type: [sigmoid, sft]
loss_weights: [2.0, 1.0]
use_weighting: true
f_divergence_type: alpha_divergence
f_alpha_divergence_coef: 0.25
sync_ref_model: true
ref_model_mixup_alpha: 0.5
max_length: 1536
max_steps: 200
warmup_steps: 0.05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
learning_rate: 5.0e-7
report_to: [wandb]
load_best_model_at_end: true
metric_for_best_model: eval_rewards/accuracies
greater_is_better: true
packing: false
"""
SCRIPT = """\
import os
from pathlib import Path
RATE = 5e-6
os.makedirs(os.environ["MARK"])
data = load_dataset("json", data_files="pairs.jsonl", split="train")
config = DPOConfig(
    output_dir=Path("out"), learning_rate=RATE, per_device_train_batch_size=4, bf16=False,
    logging_steps=args.every, seed=7,
)
peft = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
DPOTrainer(model="some/model", args=config, train_dataset=data, peft_config=peft).train()
"""


@pytest.fixture
def migrated(tmp_path, capsys):
    """Return a function (text, name, *words) -> (the result, the settings that read it)."""

    def run(text, name="run.yaml", *words):
        source, target = tmp_path / name, tmp_path / "ours.yaml"
        source.write_text(text)
        assert main(["migrate", str(source), "--output", str(target), "--json", *words]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert yaml.safe_load(target.read_text()) == result["configuration"]
        return result, read_stage(target)[1]

    return run


def groups(result):
    return {line["option"]: line["group"] for line in result["options"]}


def test_axolotl(migrated):
    result, run = migrated(AXOLOTL, "run.yaml", "--processes", "2")
    assert (result["tool"], result["stage"]) == ("Axolotl", "dpo")
    assert (run.sft_checkpoint, run.data.dataset_name) == ("some/model", "some/pairs")
    assert run.train.early_stopping_patience == 3
    assert run.data.columns == {"chosen": "best"}
    assert (run.train.batch_size, run.train.learning_rate) == (16, 2e-5)
    assert (run.train.epochs, run.train.warmup_ratio, run.train.weight_decay) == (2, 0.1, 0)
    assert (run.train.mixed_precision, run.train.gradient_checkpointing) == ("bf16", True)
    assert (run.train.trackers, run.train.tracker_project) == (["wandb"], "mine")
    assert (run.dpo.beta, run.dpo.max_length, run.data.eval_fraction) == (0.2, 2048, 0.05)
    assert (run.lora.rank, run.lora.alpha, run.lora.targets) == (8, 16, "all-linear")
    assert (run.lora.dropout, run.train.adam_beta2) == (0.0, 0.999)
    found = groups(result)
    assert set(yaml.safe_load(AXOLOTL)) <= set(found)
    assert found["micro_batch_size"] == found["datasets"] == "differs"
    assert run.train.optimizer == "adamw_8bit" and found["optimizer"] == "became"
    assert {"lora_dropout", "evals_per_epoch", "special_tokens", "trust_remote_code"} == {
        name for name, group in found.items() if group == "none"
    }
    assert found["fp16"] == found["wandb_entity"] == "off"
    assert found["model_type"] == found["sample_packing"] == "not needed"
    assert found["adam_beta2"] == "default"


def test_llama_factory(migrated):
    result, run = migrated(LLAMA_FACTORY)
    assert (result["tool"], result["stage"]) == ("LLaMA-Factory", "sft")
    assert run.pretrain_checkpoint == "some/model"
    assert [source.dataset_name for source in run.data.sources] == ["first", "second"]
    assert (run.data.max_length, run.data.template, run.data.eval_fraction) == (1024, "chat", 0.1)
    assert (run.lora.rank, run.lora.alpha) == (16, 32)
    assert run.lora.targets == ["q_proj", "v_proj"]
    assert (run.train.batch_size, run.train.schedule, run.train.save_every) == (8, "cosine", 500)
    assert run.train.gradient_checkpointing is True  # the default there
    assert set(yaml.safe_load(LLAMA_FACTORY)) <= set(groups(result))


def test_the_turns_that_are_trained_on(migrated):
    for option, targets in (("false", "all"), ("true", "last")):
        text = LLAMA_FACTORY + f"mask_history: {option}\n"
        _, run = migrated(text, "run.yaml", "--force")
        assert run.data.targets == targets
    text = "output_dir: out\nlearning_rate: 1e-5\nassistant_only_loss: true\n"
    words = ("--stage", "sft", "--model", "some/model", "--force")
    assert migrated(text, "run.yaml", *words)[1].data.targets == "all"


def test_a_yaml_file_of_trl(migrated):
    result, run = migrated(TRL_YAML, "run.yaml", "--stage", "dpo")
    assert result["tool"] == "TRL"
    assert (run.data.dataset_name, run.data.eval_split) == ("some/pairs", "validation")
    assert (run.dpo.beta, run.dpo.loss_type, run.dpo.nll_coefficient) == (
        0.05,
        ["sigmoid", "sft"],
        0,
    )
    assert (run.dpo.loss_weights, run.dpo.use_weighting) == ([2.0, 1.0], True)
    assert (run.dpo.f_divergence, run.dpo.f_alpha) == ("alpha_divergence", 0.25)
    assert (run.dpo.reference_sync_every, run.dpo.reference_mixup) == (512, 0.5)
    assert (run.train.max_steps, run.train.epochs, run.train.warmup_ratio) == (200, None, 0.05)
    assert (run.train.schedule, run.train.min_learning_rate_ratio) == ("cosine", 0.1)
    assert (run.train.eval_every, run.train.trackers) == (50, ["wandb"])
    assert (run.train.keep_best, run.train.best_metric) == (True, "eval/rewards/accuracies")
    assert run.train.batch_size == 8  # per_device_train_batch_size by default
    assert set(yaml.safe_load(TRL_YAML)) <= set(groups(result))


def test_a_script_is_read_and_not_executed(migrated, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "executed"))
    result, run = migrated(SCRIPT, "train.py")
    assert not (tmp_path / "executed").exists()
    assert (run.sft_checkpoint, run.data.dataset_name) == ("some/model", "pairs.jsonl")
    assert (run.train.learning_rate, run.train.batch_size, run.train.seed) == (5e-6, 4, 7)
    assert run.train.mixed_precision == "no"
    assert (run.lora.rank, run.lora.alpha, run.lora.targets) == (4, 8, ["q_proj"])
    assert groups(result)["logging_steps"] == "unread"
    assert run.train.log_every == 10  # ours: that of the script is not known


def test_a_column_that_the_stage_does_not_read_is_named(migrated):
    data = "datasets: [{path: some/text, type: completion, field: body, field_output: answer}]"
    result, run = migrated(f"base_model: m\n{data}\nlearning_rate: 1e-4\nmicro_batch_size: 4\n")
    assert result["stage"] == "sft" and run.data.columns == {"output": "answer"}
    (line,) = (line for line in result["options"] if line["option"] == "datasets")
    assert "field 'body' has no equivalent" in line["note"]


KTO = {
    "TRL": "model_name_or_path: m\ndataset_name: d\nloss_type: apo_zero_unpaired\nbeta: 0.2\n"
    "desirable_weight: 1.5\nmax_length: 512\nsync_ref_model: false\n",
    "Axolotl": "base_model: m\nrl: kto\nrl_beta: 0.2\nkto_desirable_weight: 1.5\n"
    "micro_batch_size: 4\ndatasets: [{path: d}]\nlearning_rate: 1e-6\n",
    "LLaMA-Factory": "model_name_or_path: m\nstage: kto\npref_beta: 0.2\nkto_chosen_weight: 1.5\n"
    "dataset: d\ncutoff_len: 512\nper_device_train_batch_size: 4\nlearning_rate: 1e-6\n",
}


@pytest.mark.parametrize("tool", KTO)
def test_a_kto_run_of_each_trainer_becomes_one_here(migrated, tool):
    result, run = migrated(KTO[tool])
    assert (result["tool"], result["stage"]) == (tool, "kto")
    assert (run.sft_checkpoint, run.kto.beta, run.kto.desirable_weight) == ("m", 0.2, 1.5)
    assert (run.kto.max_length, run.kto.undesirable_weight) == (512, 1.0)
    assert run.kto.loss_type == ("apo_zero_unpaired" if tool == "TRL" else "kto")
    assert run.train.learning_rate == 1e-6


def test_an_option_that_kto_lacks_is_named(migrated):
    result, _ = migrated("base_model: m\nrl: kto\nmicro_batch_size: 4\ndpo_label_smoothing: 0.1\n")
    (line,) = (line for line in result["options"] if line["option"] == "dpo_label_smoothing")
    assert line["note"] == "kto has no option kto.label_smoothing"


def test_a_pretraining_run_makes_a_new_model_and_says_so(migrated):
    text = "base_model: some/model\npretraining_dataset: {path: some/text}\nmax_steps: 10\n"
    result, run = migrated(f"{text}sequence_len: 256\nlearning_rate: 1e-4\nmicro_batch_size: 4\n")
    assert result["stage"] == "pretrain"
    assert (run.train.tokenizer_name, run.model.max_seq_len) == ("some/model", 256)
    assert groups(result)["base_model"] == "differs"
    assert any("example of a shape" in line for line in result["added"])


@pytest.mark.parametrize(
    ("text", "words", "reason"),
    [
        ("a: 1\n", [], "no option of TRL, Axolotl or LLaMA-Factory"),
        ("- 1\n", [], "give a mapping of options"),
        ("a: [\n", [], "not YAML or JSON"),
        ("train: {run_name: a}\n", [], "is a configuration of modern-llm already"),
        ("learning_rate: 1.0\nmodel_name_or_path: m\n", [], "say which with --tool"),
        ("model_name_or_path: m\ndataset_name: d\n", [], "say --stage dpo or --stage sft"),
        ("base_model: m\nrl: grpo\n", [], "trains grpo: the stages here are"),
        ("stage: rm\nmodel_name_or_path: m\ncutoff_len: 9\n", [], "trains rm"),
        ("beta: 0.1\ndataset_name: d\n", [], "names no model: add --model"),
        ("base_model: m\nrl: dpo\nrl_beta: -1\n", [], "the result is refused: dpo: beta=-1"),
        ("base_model: m\ndatasets: [x]\n", [], "not a list of mappings with a path"),
    ],
)
def test_what_cannot_be_migrated_is_one_line(tmp_path, capsys, text, words, reason):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(["migrate", str(file), *words]) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x = (", "not Python"),
        ("x = 1", "no call of DPOConfig"),
        ("DPOConfig()\nSFTConfig()", "2 calls of DPOConfig"),
        ("TrainingArguments('out')", "without one DPOTrainer or SFTTrainer"),
    ],
)
def test_a_script_without_one_configuration_is_refused(tmp_path, capsys, text, reason):
    file = tmp_path / "run.py"
    file.write_text(text)
    assert main(["migrate", str(file)]) == 2
    assert reason in capsys.readouterr().err


def test_what_is_printed_fits_80_columns_and_ends_with_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "run.yaml").write_text(AXOLOTL)
    monkeypatch.chdir(tmp_path)
    assert main(["migrate", "run.yaml"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "  learning_rate: 2e-5 -> train.learning_rate: 2e-05" in shown
    assert "has no equivalent" in shown and "  train:" not in shown
    written = shown[shown.index("\nsft_checkpoint: some/model\n") : shown.index("\ncheck it:")]
    (tmp_path / "ours.yaml").write_text(written)
    assert read_stage(tmp_path / "ours.yaml")[0].name == "dpo"


def test_a_file_is_overwritten_on_request_alone(tmp_path, capsys):
    source, target = tmp_path / "run.yaml", tmp_path / "ours.yaml"
    source.write_text(AXOLOTL)
    target.write_text("mine")
    words = ["migrate", str(source), "--output", str(target)]
    assert main(words) == 2
    assert "exists; name another, or add --force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert "sft_checkpoint" in target.read_text()


def test_a_foreign_option_in_our_file_or_command_line_is_recognised(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("sft_checkpoint: m\ntrain: {run_name: a, output_dir: b, logging_steps: 5}\n")
    assert main(["dpo", str(file), "--train.per-device-train-batch-size", "4"]) == 2
    assert (
        "per_device_train_batch_size of TRL is --train.batch_size here" in capsys.readouterr().err
    )
    assert main(["dpo", str(file)]) == 2
    error = capsys.readouterr().err
    assert "train.logging_steps: unknown option (logging_steps of TRL is train.log_every" in error


def test_a_spelling_is_still_recognised():
    with pytest.raises(ValueError, match="did you mean --train.learning_rate"):
        read_settings(DpoSettings, ["--train.lerning_rate", "1"], "dpo")


def test_optimizers_and_offloaded_activations(migrated):
    """`activation_offloading` is a way to recompute here, so the two options become one."""
    for value, expected in {
        "adamw_torch_fused": "adamw", "paged_adamw_8bit": "adamw_8bit", "adafactor": "adafactor",
        "muon": "muon",
    }.items():  # fmt: skip
        text = f"model_name_or_path: m\ndataset_name: d\noptim: {value}\noutput_dir: o\n"
        text += "beta: 0.1\nactivation_offloading: true\n"
        result, run = migrated(text, "run.yaml", "--stage", "dpo", "--force")
        assert run.train.optimizer == expected
        assert run.train.gradient_checkpointing == "offload"
        assert groups(result)["activation_offloading"] == "differs"
