"""The plan: monotone where it must be, honest about what it does not know, quick."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from modern_llm.cli import main
from modern_llm.config import LoraConfig, ModernLLMConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.models.adapters import add_adapters
from modern_llm.models.build import build_model
from modern_llm.planning.memory import ParallelLayout, Parameter, Sizes, plan_memory
from modern_llm.planning.outline import outline, outline_of_new
from modern_llm.planning.planner import (
    PRESETS,
    STEP,
    USABLE,
    PlanRequest,
    measured_throughput,
    memory_size,
    plan,
    with_adapters,
)

ROOT = Path(__file__).parents[2]
WISH = {
    "model": "m", "gpus": 8, "gpus_per_node": 8, "gpu_memory": 80 * 10**9, "precision": "bf16",
    "longest": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    """The shape of an 8B Llama, no weights."""
    folder = tmp_path_factory.mktemp("8b")
    LlamaConfig(
        num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def planned(folder, **changes) -> dict:
    return plan(*outline(str(folder)), PlanRequest(**(WISH | changes)))


def test_a_copy_that_is_saved_beside_the_training_is_counted_in_the_host(eight_billion):
    rows = planned(eight_billion, background_saving=True)["rows"]
    plain = planned(eight_billion)["rows"]
    for row, without in zip(rows, plain, strict=True):
        sharers = 8 if row["preset"].startswith("zero") else 1
        copy = row["host"]["saving"]
        assert copy == pytest.approx(12 * 8_030_261_248 / sharers, rel=1e-4)
        assert {k: v for k, v in row["host"].items() if k != "saving"} == without["host"]


def test_bytes_are_the_memory_models(eight_billion):
    shapes, sizes = outline(str(eight_billion))
    result = planned(eight_billion)
    assert result["parameters"] == 8_030_261_248
    row = next(r for r in result["rows"] if (r["preset"], r["reference"]) == ("zero3", "model"))
    expected = plan_memory(
        [Parameter(shape) for shape in shapes.values()],
        Sizes(**sizes),
        ParallelLayout(world=8, stage=3, precision="bf16", reference=True, tokens=row["tokens"],
                checkpointing=row["checkpointing"]),
    )  # fmt: skip
    assert row["device"] == expected.device and row["device_total"] == sum(expected.device.values())


def test_the_budget_is_the_largest_that_fits(eight_billion):
    for row in planned(eight_billion)["rows"]:
        if not row["fits"]:
            assert row["tokens"] is None
            continue
        assert row["device_total"] <= USABLE * WISH["gpu_memory"]
        more = planned(
            eight_billion, tokens=row["tokens"] + STEP, checkpointing=row["checkpointing"]
        )
        same = next(
            r for r in more["rows"]
            if (r["preset"], r["reference"]) == (row["preset"], row["reference"])
        )  # fmt: skip
        assert not same["fits"], (row["preset"], row["tokens"])


def test_more_gpus_never_need_more_of_each_and_a_live_reference_never_less(eight_billion):
    few, many = (planned(eight_billion, gpus=n, tokens=2048) for n in (2, 8))
    for a, b in zip(few["rows"], many["rows"], strict=True):
        assert b["device_total"] <= a["device_total"]
    rows = {(r["preset"], r["reference"]): r for r in many["rows"]}
    for name in PRESETS:
        assert rows[name, "model"]["device_total"] > rows[name, "cache"]["device_total"]


def test_the_fastest_preset_that_fits_is_recommended(eight_billion, tmp_path):
    result = planned(eight_billion)
    assert result["recommended"] == "zero1"
    for part in ("accelerate_configs/zero1.yaml", "--num_processes 8", "-m modern_llm dpo",
                 f"--train.tokens_per_micro_batch {result['tokens_per_micro_batch']}"):  # fmt: skip
        assert part in result["launch"]
    assert planned(eight_billion, gpus=2)["recommended"].startswith("zero3")
    nothing = planned(eight_billion, gpus=1, gpu_memory=4 * 10**9)
    assert nothing["recommended"] is None and nothing["launch"] is None
    LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=512, tie_word_embeddings=False,
    ).save_pretrained(tmp_path)  # fmt: skip
    small = planned(tmp_path, gpus=1)
    assert small["recommended"] == "ddp" and "single_gpu.yaml" in small["launch"]


def test_several_machines_have_their_own_files(eight_billion):
    result = planned(eight_billion, gpus=16)
    assert {row["preset"] for row in result["rows"]} == {"zero2", "zero3"}
    assert "multi_node_zero2.yaml" in result["launch"] and "--num_machines 2" in result["launch"]


def test_every_file_of_a_launch_line_is_there():
    folder = ROOT / "accelerate_configs"
    names = {p.file for p in PRESETS.values()} | {p.several_nodes for p in PRESETS.values()}
    assert all((folder / name).is_file() for name in names | {"single_gpu.yaml"} if name)


def test_time_and_cost_are_tokens_over_throughput(eight_billion):
    run = {"steps": 1000, "batch_size": 16, "tokens_per_second": 20_000.0, "price": 2.0}
    result = planned(eight_billion, **run, example_tokens=500.0)
    assert result["tokens"] == 8_000_000 and result["seconds"] == 400.0
    assert result["cost"] == pytest.approx(400 / 3600 * 8 * 2, abs=0.01)
    assert not result["upper_bound"]
    assert planned(eight_billion, **run)["seconds"] == pytest.approx(
        1000 * 16 * 1024 / 20_000, 1e-3
    )
    assert planned(eight_billion)["seconds"] is None


def test_a_measured_throughput_is_the_median_of_a_run(tmp_path):
    lines = [
        {"step": i, "tokens_per_second": v} for i, v in enumerate([5.0, 900.0, 1000.0, 1100.0])
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_throughput(tmp_path) == 950.0


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("80GB", 80 * 10**9), ("24GiB", 24 * 2**30), (" 40 gb ", 40 * 10**9), ("1.5TB", 15 * 10**11)],
)
def test_sizes(text, bytes_):
    assert memory_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "80PB", "0GB", "-1GB", "eighty"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="is no size"):
        memory_size(text)


def test_the_verb_reads_a_run_and_shows_a_table(eight_billion, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = {
        "sft_checkpoint": str(eight_billion),
        "train": {"run_name": "a", "output_dir": str(tmp_path / "o"), "max_steps": 100},
        "dpo": {"max_length": 1024},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))
    words = ["plan", "--config", str(file), "--gpus", "8", "--mixed_precision", "bf16"]
    assert main([*words, "--tokens_per_second", "1e5"]) == 0
    out = capsys.readouterr().out
    for part in ("8,030,261,248 parameters", "zero3_offload", "recommended: ", "time: at most"):
        assert part in out, part
    assert f"--config {file}" in out.replace("\n", "")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "give --model, or --config"),
        (["--model", "no/such"], "no/such"),
        (["--model", "x", "--gpu_memory", "lots"], "is no size"),
        (["--model", "x", "--price", "2"], "price has no effect without a throughput"),
        (["--model", "x", "--tokens_per_second", "2"], "needs the length of the run"),
        (["--model", "x", "--gpus", "12"], "no multiple of gpus_per_node"),
        (["--model", "x", "--measured", "nowhere"], "no metrics of a run there"),
        (["--model", "x", "--gpus", "0"], "greater than 0"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words, part, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert part in err and len(err.strip().splitlines()) == 1


def test_a_plan_takes_under_three_seconds(eight_billion):
    words = [
        sys.executable,
        "-m",
        "modern_llm",
        "plan",
        "--model",
        str(eight_billion),
        "--gpus",
        "8",
    ]
    # Time on the processor: a machine that is busy with other things says nothing of ours.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, capture_output=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize(
    "options",
    [{}, {"targets": ["q_proj", "v_proj"], "rank": 8}, {"modules_to_save": ["embed_tokens"]}],
)
def test_adapters_are_counted_as_they_are_added(options):
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    config = ModernLLMConfig(
        vocab_size=100, d_model=32, n_layers=2, n_heads=4, tie_embeddings=False
    )
    lora, model = LoraConfig(**options), build_model(config, seed=0)
    add_adapters(model, lora, "here", seed=0)
    shapes, sizes = outline_of_new(config)
    found = with_adapters(shapes, lora)
    trained = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    assert sorted(p.shape for p in found if p.trained) == trained
    assert sum(p.numel for p in found) == sum(p.numel() for p in model.parameters())
    result = plan(shapes, sizes, PlanRequest(**WISH, lora=lora))
    assert result["trained"] == sum(p.numel for p in found if p.trained)
    live, cached = (
        [r["device_total"] for r in result["rows"] if r["reference"] == how]
        for how in ("model", "cache")
    )
    assert live == cached  # the reference is the base with the adapters off


def test_adapters_need_far_less_and_quantized_ones_are_not_planned(eight_billion):
    whole, small = (
        next(r for r in planned(eight_billion, lora=lora, tokens=2048)["rows"])
        for lora in (None, LoraConfig())
    )
    assert small["device"]["optimizer"] < 0.02 * whole["device"]["optimizer"]
    with pytest.raises(ConfigError, match="lora.quantize"):
        planned(eight_billion, lora=LoraConfig(quantize="nf4"))


def test_gpus_that_share_rows_hold_a_part_of_the_longest_and_say_what_they_send(eight_billion):
    whole, shared = (
        planned(eight_billion, longest=65_536, sequence_parallel=size, checkpointing=True)
        for size in (1, 4)
    )
    for alone, part in zip(whole["rows"], shared["rows"], strict=True):
        assert part["fits"] or not alone["fits"]
        assert part["sent"].pop("all-to-all") > 0 and set(part["sent"]) == set(alone["sent"])
    assert "--train.sequence_parallel 4" in shared["launch"]
    with pytest.raises(ConfigError, match="sequence_parallel 3 does not divide the 8 GPUs"):
        planned(eight_billion, sequence_parallel=3)
    with pytest.raises(UserError, match="does not divide the 32 attention heads"):
        planned(eight_billion, gpus=24, sequence_parallel=24)


def test_long_rows_that_do_not_fit_name_the_options_with_which_they_do(eight_billion):
    def of(**changes):
        return planned(eight_billion, longest=260_000, **changes)

    found = of()
    assert found["recommended"] is None and found["fits_with"] is not None
    words = found["fits_with"].split()
    assert words[::2] == ["--mlp_chunk", "--sequence_parallel"]
    chunk, parts = map(int, words[1::2])
    assert of(mlp_chunk=chunk, sequence_parallel=parts)["recommended"] is not None
    assert of(mlp_chunk=chunk, sequence_parallel=parts // 2)["recommended"] is None
    assert of(gpu_memory=10**9)["fits_with"] is None
    assert planned(eight_billion)["fits_with"] is None
