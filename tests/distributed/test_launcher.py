"""Launcher variables in the environment change no number: the run's configuration decides."""

from __future__ import annotations

import os
import re
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import Accelerator

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.distributed import launcher
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.runtime import start
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, numbers, stage, use_deepspeed

ANYTHING = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_FP8_BACKEND": "MSAMP",
    "ACCELERATE_FP8_OPT_LEVEL": "O2",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
    "ACCELERATE_DYNAMO_MODE": "max-autotune",
    "ACCELERATE_ALLOW_CP_STANDALONE": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_MIXED_PRECISION": "no",
}


def config(**changes):
    return TrainingConfig(**({"run_name": "x", "output_dir": Path("x"), "batch_size": 4} | changes))


@pytest.fixture(scope="module")
def tiny_pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", transcripts(30))


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))


@pytest.fixture
def launched(monkeypatch):
    """Set variables as a launcher would, and remove all others."""

    def use(**variables: str) -> None:
        for name in list(os.environ):
            if name.startswith((*launcher.PREFIXES, "FSDP_")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return use


def test_every_variable_that_accelerate_reads_is_hidden_or_known(launched):
    text = "".join(p.read_text() for p in Path(accelerate.__file__).parent.rglob("*.py"))
    names = set(re.findall(r"""["'](ACCELERATE_[A-Z0-9_]*[A-Z0-9])["']""", text))
    assert {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS", *launcher.KEPT} <= names
    launched(**dict.fromkeys(names, "x"))
    with launcher.hidden():
        assert names & set(os.environ) == set(launcher.KEPT)
    assert names <= set(os.environ)


def test_no_variable_reaches_what_accelerate_starts(launched):
    launched(**ANYTHING)
    accelerator = start(config()).accelerator
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no" and not accelerator.fp8_enabled
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.parallelism_config is None


def test_no_variable_changes_a_step(launched, tmp_path, tiny_checkpoint, tiny_pairs):
    def run(name: str):
        return dpo(
            tiny_checkpoint,
            tiny_pairs,
            Case(tmp_path / name, train={"max_steps": 2, "warmup_steps": 1}),
        )

    launched()
    plain = run("plain")
    launched(**ANYTHING)
    assert run("launched") == plain


def test_gradient_accumulation_set_by_a_script_divides_nothing(launched):
    launched()
    model = torch.nn.Linear(3, 1, bias=False)
    runtime = start(config())

    class Scorer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

    engine = Engine(runtime.accelerator, Scorer(), torch.optim.AdamW(model.parameters()))
    Accelerator(gradient_accumulation_steps=8)  # of a user's own: the state is shared
    try:
        engine.backward(model(torch.ones(1, 3)).sum(), last=True)
        assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]
    finally:
        start(config())


def test_gradient_accumulation_of_the_launcher_is_a_warning(launched, caplog):
    launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="8")
    with caplog.at_level("WARNING"):
        start(config())
        assert "gradient_accumulation_steps 8 of accelerate has no effect" in caplog.text
        caplog.clear()
        launched(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="1")
        start(config())
        assert not caplog.text


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "accelerate launch sets mixed precision fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "INDUCTOR of accelerate has no effect"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism_config_tp_size 2 of accelerate is not supported",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version 1 is not supported"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "2",
             "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "leaves the weights of all processes but the first empty",
        ),
    ],
)  # fmt: skip
def test_settings_that_would_change_the_computation_are_refused(launched, variables, sentence):
    launched(**variables)
    with pytest.raises(ConfigError, match=sentence):
        start(config())


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, None),
        ({"ACCELERATE_GRADIENT_CLIPPING": "auto"}, None),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero_stage 3 of accelerate contradicts"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param_device cpu"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "gradient_clipping 0.5 .*max_grad_norm 1.0"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "much"}, "gradient_clipping much"),
    ],
)
def test_a_field_beside_a_file_must_agree_with_it(launched, variables, sentence):
    launched(**variables)
    found = list(launcher.fields_beside(stage(2), "zero2.json", config()))
    assert len(found) == (sentence is not None)
    assert sentence is None or re.search(sentence, found[0])


def by_fields(checkpoint: Path, data: Path, folder: Path) -> list[list]:
    """The same run with a JSON, and with the fields of Accelerate's YAML instead."""
    steps = {"max_steps": 2, "warmup_steps": 1}
    found = [dpo(checkpoint, data, Case(folder / "file", stage(2), steps))]
    real = os.environ.copy()
    use_deepspeed(None, folder)
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,zero3_init_flag,gradient_clipping",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8",
        "ACCELERATE_FP8_BACKEND": "MSAMP",
    }  # fmt: skip
    from modern_llm.config import PreferenceDatasetConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    run_dpo(
        checkpoint,
        config(
            output_dir=folder / "fields", batch_size=8, learning_rate=1e-3, warmup_steps=1,
            log_every=1, tokens_per_micro_batch=300, save_every=1000, max_steps=2,
        ),
        DPOConfig(max_length=64),
        PreferenceDatasetConfig(dataset_name=str(data)),
    )  # fmt: skip
    os.environ.clear()
    os.environ |= real
    return [*found, numbers(folder / "fields")]


@pytest.mark.slow
def test_fields_without_a_json_are_the_same_run(tmp_path, tiny_checkpoint, tiny_pairs):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    ((file, fields),) = run_ranks(by_fields, 1, tiny_checkpoint, tiny_pairs, tmp_path, timeout=200)
    assert fields == file and len(file) == 2


@pytest.mark.parametrize(
    ("variable", "value", "world", "warned"),
    [
        ("SLURM_STEP_NUM_TASKS", "8", 1, True),
        ("SLURM_STEP_NUM_TASKS", "2", 16, False),  # one task a node, each with torchrun
        ("OMPI_COMM_WORLD_SIZE", "2", 1, True),
        ("PMI_SIZE", "1", 1, False),
        ("PMI_SIZE", "many", 1, False),
    ],
)
def test_a_launch_of_more_processes_than_arrived_is_named(
    variable, value, world, warned, monkeypatch
):
    for name in launcher.STARTED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    text = launcher.missing_processes(world)
    assert bool(text) == warned
    if warned:
        assert text.startswith(f"{variable} is {value}, and 1 process arrived")
        assert f"torchrun --nproc_per_node {value}" in text


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python /bin/accelerate launch --cpu --num_processes 2 -m x", "2"),
        ("python -m accelerate.commands.launch --num_processes=4 x.py", "4"),
        ("python /bin/accelerate launch --cpu -m x", ""),
        ("python tool.py --num_processes 2", ""),
    ],
)
def test_the_number_on_accelerates_command_line_is_found(line, found, monkeypatch):
    words = "\0".join(line.split()).encode()
    monkeypatch.setattr(launcher, "read_bytes", lambda path: words)
    assert launcher._told_to_accelerate() == found


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_grows_segments_unless_the_user_has_set_it_up(name, monkeypatch):
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(known, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "max_split_size_mb:128")
    launcher.grow_segments()
    expected = "expandable_segments:True" if name is None else None
    assert (os.environ.get("PYTORCH_ALLOC_CONF") == expected) == (name != "PYTORCH_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
