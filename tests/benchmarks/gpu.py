"""DPO on one GPU: this package against TRL, its share of the peak, trees against separate rows.

Llama shapes of 0.5 and 1.2 billion parameters with random weights, in bfloat16, on HH-RLHF
transcripts (`--data FILE`, repeated as epochs) or a synthetic corpus of similar lengths. Both sides
keep float32 weights and compute in bfloat16, with a cached reference. Sides alternate, each in a
separate process, until the time is used up (`--limit`, below 8 minutes); medians are reported. The
first steps of each are not timed, because kernels are compiled there. Needs no network and no
DeepSpeed. Without CUDA it prints that and ends with status 0; without TRL its rows stay empty.

    python tests/benchmarks/gpu.py [--data FILE] [--output TABLE.md]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    BETA,
    MAX_LENGTH,
    RATE,
    SEED,
    TRL,
    Figure,
    Measured,
    apart,
    longest,
    median,
    peak_bytes,
    place,
    read_lines,
    read_transcripts,
    say,
    spread,
    verdicts,
    write_lines,
    write_model,
    write_tokenizer,
)

VOCABULARY = 32_000
SHAPES: dict[str, dict[str, int]] = {
    "0.5B": {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "1.2B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 18,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""A shape for testing the script, on any device (`--tiny`)."""
REQUIRED = {"speed": 3.0, "mfu": 0.45, "memory": 0.5, "trees": 1.35}
PACKAGES = ("modern-llm", "torch", "transformers", "accelerate", "trl")


def synthetic(count: int) -> list[dict[str, str]]:
    """Pairs of random words with lengths as in HH-RLHF: prompts of about 90 words, answers of 40,
    both with a long tail."""
    draw = random.Random(SEED)
    letters = "abcdefghijklmnoprstuvw"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 8))) for _ in range(3000)]

    def text(mean: float) -> str:
        count = int(draw.lognormvariate(mean, 0.8))
        return " ".join(draw.choices(words, k=max(1, min(220, count))))

    return [
        {
            "prompt": f"\n\nHuman: {text(4.2)}\n\nAssistant:",
            "chosen": f" {text(3.4)}",
            "rejected": f" {text(3.4)}",
        }
        for _ in range(count)
    ]


def prepare(options: argparse.Namespace) -> Measured:
    """Write tokenizer, model of a shape, and pairs for all sides."""
    pairs = read_transcripts(options.data) if options.data else synthetic(600)
    folder = options.folder / "model"
    tokenizer = write_tokenizer(pairs, folder, 512 if options.tiny else 8192)
    # The sides truncate over-long pairs differently; without those they do the same work.
    fitting = [pair for pair in pairs if longest(tokenizer, pair) <= MAX_LENGTH]
    if len(fitting) < options.pairs:
        sys.exit(f"gpu: error: {len(fitting)} pairs of at most {MAX_LENGTH} tokens, "
                 f"a step has {options.pairs}")  # fmt: skip
    write_lines(options.folder / "pairs.jsonl", fitting)
    write_model(folder, VOCABULARY, **(TINY if options.tiny else SHAPES[options.shape]))
    return {"pairs": len(fitting), "too_long": len(pairs) - len(fitting)}


def begin_peak() -> None:
    """Reset the peak memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Return the peak memory since in GB: of the GPU, or of this process without one."""
    import torch

    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
    return used / 1e9


def run_ours(options: argparse.Namespace) -> Measured:
    """One measurement of this package: trees, then every answer as a separate packed row."""
    from modern_llm.setup import micro_batches

    found = _ours(options, place() / "trees")
    plain = micro_batches.Examples
    # The same attention and packing, but each answer has its own prompt.
    micro_batches.Examples = lambda table, **more: plain(table, **(more | {"trees": False}))
    try:
        rows = _ours(options, place() / "rows")
    finally:
        micro_batches.Examples = plain
    assert rows["prefix_saving"] == 0 < found["prefix_saving"], (rows, found)
    return found | {"rows_pairs_per_s": rows["pairs_per_s"], "rows_losses": rows["losses"]}


def _ours(options: argparse.Namespace, out: Path) -> Measured:
    from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
    from modern_llm.training import stage
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    stage.export = lambda *_: None  # writing gigabytes is not measured
    begin_peak()
    run_dpo(
        options.folder / "model",
        TrainingConfig(
            run_name="bench",
            output_dir=out,
            batch_size=options.pairs,
            max_steps=options.steps,
            learning_rate=RATE,
            schedule="constant",
            seed=SEED,
            log_every=options.warm,
            mixed_precision="no" if options.tiny else "bf16",
        ),
        DPOConfig(beta=BETA, max_length=MAX_LENGTH),
        PreferenceDatasetConfig(dataset_name=str(options.folder / "pairs.jsonl")),
    )
    records = read_lines(out / "metrics.jsonl")
    timed = [record for record in records if record["step"] >= options.warm]
    steps = timed[-1]["step"] - timed[0]["step"]
    return {
        "pairs_per_s": steps * options.pairs / (timed[-1]["elapsed_s"] - timed[0]["elapsed_s"]),
        "peak_gb": peak_gb(),
        "mfu": statistics.median(record.get("mfu", 0.0) for record in timed[1:]),
        "padding": timed[-1]["padding"],
        "prefix_saving": timed[-1]["prefix_saving"],
        "losses": {record["step"]: record["loss"] for record in records},
    }


def run_trl(options: argparse.Namespace) -> Measured:
    """One measurement of TRL, with its defaults except for the arguments set here."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from modern_llm.data.batch.order import Order

    pairs = read_lines(options.folder / "pairs.jsonl")
    order = Order(len(pairs), options.pairs, SEED)
    ordered = [pairs[i] for step in range(options.steps) for i in order.step(step)]
    on_gpu, times = torch.cuda.is_available(), []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter())

    config = DPOConfig(
        output_dir=str(place() / "trl"),
        use_cpu=not on_gpu,
        bf16=not options.tiny,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.pairs // options.micro_batch,
        precompute_ref_batch_size=options.micro_batch,
        max_steps=options.steps,
        optim="adamw_torch_fused",
        **TRL,
    )
    begin_peak()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(ordered),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
        callbacks=[Clock()],
    )
    trainer.train()
    steps = options.steps - options.warm
    seconds = times[-1] - times[options.warm - 1]
    return {"pairs_per_s": steps * options.pairs / seconds, "peak_gb": peak_gb()}


SIDES = {"prepare": prepare, "ours": run_ours, "trl": run_trl}


def rounds(
    options: argparse.Namespace, shape: str, folder: Path, until: float
) -> dict[str, list[Measured]]:
    """Measure all sides of one shape in turn, as often as the time allows, at least once."""
    values = {name: getattr(options, name) for name in ("pairs", "steps", "warm", "micro_batch")}
    if options.data:
        values["data"] = options.data
    flags = {"tiny": int(options.tiny), "shape": shape}

    def measure(side: str) -> Measured:
        return apart(__file__, side, folder, options.threads, **values, **flags)

    print(f"{shape}: {measure('prepare')}", flush=True)
    sides = ["ours"] + ["trl"] * (importlib.util.find_spec("trl") is not None)
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    slowest = 0.0
    while len(found["ours"]) < options.repeats:
        began = time.monotonic()
        if found["ours"] and began + slowest > until:
            break
        for side in sides:
            found[side].append(measure(side))
            say(f"{shape} {side} {len(found[side])}", found[side][-1])
        slowest = max(slowest, time.monotonic() - began)
    return found


def figures(found: dict[str, dict[str, list[Measured]]]) -> list[Figure]:
    """Return the measured figures with their requirements."""
    result = []
    for shape, sides in found.items():
        ours, trl = sides["ours"], sides.get("trl")
        rate = median(ours, "pairs_per_s")
        if trl:
            ratio = rate / median(trl, "pairs_per_s")
            result.append(Figure(f"{shape}: pairs/s over TRL", ratio, REQUIRED["speed"]))
            ratio = median(ours, "peak_gb") / median(trl, "peak_gb")
            name = f"{shape}: peak memory over TRL"
            result.append(Figure(name, ratio, REQUIRED["memory"], at_least=False))
        ratio = rate / median(ours, "rows_pairs_per_s")
        result.append(Figure(f"{shape}: trees over packed rows", ratio, REQUIRED["trees"]))
        if shape == list(SHAPES)[-1]:
            result.append(Figure(f"{shape}: MFU", median(ours, "mfu"), REQUIRED["mfu"]))
    return result


def table(found: dict[str, dict[str, list[Measured]]], data: str) -> str:
    """Return the table for docs/reference/benchmarks.md: device, versions, date, figures."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES if version(name))
    lines = [
        f"Device: {device}. Date: {datetime.date.today().isoformat()}. Versions: {versions}, "
        f"CUDA {torch.version.cuda}. Data: {data}.",
        "",
        "| | rounds | minimum / median / maximum |",
        "|---|---|---|",
    ]
    for shape, sides in found.items():
        for side, measured in sides.items():
            for name in ("pairs_per_s", "rows_pairs_per_s", "peak_gb", "mfu"):
                if name in measured[0]:
                    values = spread((each[name] for each in measured), 3)
                    lines.append(f"| {shape} {side} {name} | {len(measured)} | {values} |")
    lines += ["", "| figure | measured | required |", "|---|---|---|"]
    for figure in figures(found):
        sign = ">=" if figure.at_least else "<="
        lines.append(f"| {figure.name} | {figure.value:.3g} | {sign} {figure.required:g} |")
    return "\n".join(lines) + "\n"


def version(package: str) -> str | None:
    """Return the installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return 0
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        print("gpu: skipped, there is no CUDA device")
        return 0
    began, found = time.monotonic(), {}
    for at, shape in enumerate(options.shapes, start=1):
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            until = began + options.limit * at / len(options.shapes)
            found[shape] = rounds(options, shape, Path(folder), until)
    verdicts(figures(found))
    text = table(found, str(options.data.name) if options.data else "synthetic")
    print(f"\n{text}")
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="HH-RLHF transcripts; else a synthetic corpus")
    parser.add_argument("--output", type=Path, help="file for the table")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pairs", type=int, default=64, help="pairs of one optimizer step")
    parser.add_argument("--steps", type=int, default=32, help="steps of one measurement")
    parser.add_argument("--warm", type=int, default=8, help="steps before the clock starts")
    parser.add_argument("--micro_batch", type=int, default=16, help="pairs of a forward of TRL")
    parser.add_argument("--repeats", type=int, default=5, help="most rounds of a shape")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which none begins")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--tiny", type=int, default=0, help="1: a tiny shape, on any device")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.steps < 2 * options.warm or options.pairs % options.micro_batch:
        parser.error("give at least twice as many --steps as --warm, and --pairs that "
                     "--micro_batch divides")  # fmt: skip
    if options.data and not options.data.is_file():
        parser.error(f"--data {options.data}: there is no such file")
    return options


if __name__ == "__main__":
    sys.exit(main())
