"""Rows that processes share (`train.sequence_parallel`) give the same run as one process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.distributed import launcher
from modern_llm.models.scorer import TokenScorer
from modern_llm.setup.scorers import check_split
from tests.helpers.ranks import run_ranks
from tests.helpers.text import make_checkpoint, transcripts, write_jsonl
from tests.helpers.zero import Case, all_cases, dpo, stage
from tests.training.test_zero import close, same_run

TEN = {"max_steps": 10}
MORE: dict[str, dict[str, Any]] = {
    "recomputed": {"train": {"gradient_checkpointing": True}},
    "selective": {"train": {"gradient_checkpointing": "selective"}},
    "mask": {"train": {"attention": "mask"}},
    "across pairs": {"dpo": {"loss_type": "aot"}},
    "by length": {"dpo": {"ld_alpha": 0.5}},
    "reference model": {"dpo": {"reference": "model"}},
    "moving": {"dpo": {"reference_sync_every": 4}},
    "weighted": {"dpo": {"use_weighting": True}},
}


def counted(checkpoint: Path, data: Path, cases: dict[str, Case]) -> tuple[dict, int]:
    """On one rank: run the cases; count the forwards that computed a part of their rows."""
    real, parts = TokenScorer._forward_part, []

    def noted(self, group, ids, *others):
        parts.append(group.size)
        return real(self, group, ids, *others)

    TokenScorer._forward_part = noted
    return all_cases(checkpoint, data, cases), len(parts)


def check(world: int, checkpoint: Path, data: Path, cases: dict[str, Case], expected, alone):
    """Run `cases` on `world` processes, and compare with `expected` and the run in `alone`."""
    for found, parts in run_ranks(counted, world, checkpoint, data, cases, timeout=500):
        assert parts > 10 * len(cases)
        for name, numbers in found.items():
            same_run(numbers, expected[name], 1e-5)
    for name, case in cases.items():
        close(case.folder, alone[name], 1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "p.jsonl", transcripts(45))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_engine_equals_one_process(world, tmp_path, tiny_checkpoint, pairs):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    alone = tmp_path / "alone"
    expected = dpo(tiny_checkpoint, pairs, Case(alone))
    assert len(expected) == 20
    kinds = {"ddp": (None, 2), "zero2": (stage(2), 2), "zero3": (stage(3), world)}
    if world == 4:
        kinds["ddp of four"] = (None, 4)
    cases = {
        name: Case(tmp_path / name, zero, train={"sequence_parallel": size})
        for name, (zero, size) in kinds.items()
    }
    same = dict.fromkeys(cases, expected), dict.fromkeys(cases, alone)
    check(world, tiny_checkpoint, pairs, cases, *same)


@pytest.mark.slow
def test_options_of_training_and_losses(tmp_path, tiny_checkpoint, pairs):
    expected, alone, cases = {}, {}, {}
    for name, changes in MORE.items():
        train = TEN | changes.get("train", {})
        alone[name] = tmp_path / f"{name} alone"
        plain = Case(alone[name], train=train, dpo=changes.get("dpo", {}))
        expected[name] = dpo(tiny_checkpoint, pairs, plain)
        train = train | {"sequence_parallel": 2}
        cases[name] = Case(tmp_path / name, train=train, dpo=changes.get("dpo", {}))
    check(2, tiny_checkpoint, pairs, cases, expected, alone)


def config(**changes) -> TrainingConfig:
    fields = {"run_name": "x", "output_dir": Path("x"), "batch_size": 8, "sequence_parallel": 2}
    return TrainingConfig(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention": "separate"}, "sequence_parallel 2 needs the tree attention"),
        ({"compile": True}, "sequence_parallel 2 and compile exclude each other"),
        ({"sequence_parallel": 0}, "greater than 0"),
    ],
)
def test_options_that_exclude_it(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**changes)


def test_processes_form_whole_groups(monkeypatch):
    for name in [n for n in os.environ if n.startswith(launcher.PREFIXES)]:
        monkeypatch.delenv(name)
    launcher.refuse_contradictions(config(), on_cpu=True, world=4)
    with pytest.raises(ConfigError, match="sequence_parallel 2 does not divide the 3 processes"):
        launcher.refuse_contradictions(config(), on_cpu=True, world=3)


def model(**fields) -> Any:
    found = SimpleNamespace(model_type="m", **fields)
    found.get_text_config = lambda: found
    return found


def test_models_are_refused_before_they_are_loaded():
    check_split(config(), model(num_attention_heads=4, layer_types=["full_attention"]))
    with pytest.raises(UserError, match="has 9 attention heads, which 2 processes"):
        check_split(config(), model(num_attention_heads=9))
    for kind in ("linear_attention", "conv", "mamba"):
        with pytest.raises(UserError, match=f"has {kind} layers"):
            layers = ["full_attention", kind]
            check_split(config(), model(num_attention_heads=4, layer_types=layers))


def test_a_command_ends_with_one_line(tmp_path, tiny_tokenizer, pairs, capsys):
    from modern_llm.cli import main

    checkpoint = make_checkpoint(tmp_path / "m", tiny_tokenizer)
    command = ["dpo", "--sft_checkpoint", str(checkpoint), "--data.dataset_name", str(pairs),
               "--train.run_name", "x", "--train.output_dir", str(tmp_path / "out"),
               "--train.sequence_parallel", "2"]  # fmt: skip
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "sequence_parallel 2 does not divide the 1 process: start" in error
