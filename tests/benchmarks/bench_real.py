"""DPO of a real chat model: this package against TRL at TRL's fastest setting.

    python tests/benchmarks/bench_real.py --model FOLDER --data PAIRS.json [--repeats 3]

Both sides start from the same `transformers` folder and train on the same pairs in the same order,
with the model's own chat template. TRL is given this package's token ids (its own would end a
response with the line break that some templates write after the end marker), and the script asserts
that the losses of every step are equal. Each measurement is a process; the sides alternate.

TRL is timed first with batches of 1, 2, 4 and 8 pairs (its `padding_free` is switched off by TRL
1.16 itself); the fastest for training and for the reference pass are compared with. Rows longer
than `--max_length` are left out: the sides truncate differently.

Timed: (reference) scoring all pairs; (training) all steps but the first. The process's
CPU time is shown too, which other work on the machine changes less. Memory is the peak of the
process. The share of the matrix peak divides the operations that the training needs by its CPU
time and by the rate of one large product, measured in the same process before and after.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    BETA,
    SEED,
    TRL,
    Figure,
    alternating,
    apart,
    best_sizes,
    lacks_trl,
    matrix_rate,
    median,
    parsed,
    parser,
    peak_bytes,
    place,
    read_lines,
    spread,
    tried_sizes,
    verdicts,
    write_lines,
)

RATE = 1e-6
"""A step as small as users take, so that the losses of the sides stay comparable."""
BATCHES = (1, 2, 4, 8)
LOSS_BOUND = 1e-4
REQUIRED = {"training_pairs_per_s": 1.6, "reference_pairs_per_s": 1.6, "peak_gb": 0.6}
NAMES = ("training_pairs_per_s", "training_pairs_per_cpu_s", "reference_pairs_per_s", "peak_gb")
PASSED_ON = ("data", "steps", "batch", "max_length", "model", "dtype", "lora")
"""Options of this script that a single measurement gets."""


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write pairs of the file that fit, with the ids that this package trains on."""
    tokens = options.folder / "tokens.jsonl"
    words = ["inspect", "--data", str(options.data), "--tokenizer", str(options.model)]
    words += ["--tokens", str(tokens), "--max_length", str(1 << 20)]
    done = subprocess.run(
        [sys.executable, "-m", "modern_llm", *words], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"bench: error: inspect ended with {done.returncode}: {done.stderr[-2000:]}")
    kept = [row for row in read_lines(tokens) if _longest(row) <= options.max_length]
    needed = options.steps * options.batch
    if len(kept) < needed:
        sys.exit(
            f"bench: error: {options.data} has {len(kept)} pairs of at most {options.max_length} "
            f"tokens, {options.steps} steps need {needed}: lower --steps or raise --max_length"
        )
    kept = random.Random(SEED).sample(kept, needed)
    rows = _rows_as_trl_reads_them(options.data, [row["origin"] for row in kept])
    write_lines(options.folder / "pairs.jsonl", rows)
    ids = [{name: row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for row in kept]
    write_lines(options.folder / "ids.jsonl", ids)
    sizes = [sum(len(part) for part in row.values()) for row in ids]
    return {"pairs": needed, "tokens_a_pair": sum(sizes) / needed}


def _longest(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _rows_as_trl_reads_them(file: Path, origins: list[str]) -> list[dict[str, Any]]:
    """Return the rows with these origins as message lists, or as strings where they are strings."""
    from modern_llm.data.read.formats import PREFERENCES
    from modern_llm.data.read.sources import open_source
    from modern_llm.data.table.iterate import RecordReader

    read = RecordReader(PREFERENCES, "auto")
    found = {row.origin: row for row in open_source(str(file))}
    pairs = [read(found[origin]) for origin in origins]
    answers = [{"chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    return [
        {"prompt": pair.prompt, **{k: v if isinstance(v, str) else [v] for k, v in both.items()}}
        for pair, both in zip(pairs, answers, strict=True)
    ]


class Clock:
    """Seconds and CPU seconds of the process between two calls."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Note the time now."""
        self.marks.append((time.perf_counter(), time.process_time()))

    def between(self, first: int, last: int) -> tuple[float, float]:
        """Return both kinds of seconds between two marks."""
        pairs = zip(self.marks[last], self.marks[first], strict=True)
        return tuple(later - earlier for later, earlier in pairs)  # type: ignore[return-value]


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of TRL."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(options.threads)
    order = _order(options)
    ids = read_lines(options.folder / "ids.jsonl")
    columns = [{f"{name}_ids": ids[i][name] for name in ids[i]} for i in order]
    steps, reference, losses = Clock(), Clock(), []

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.mark()

    class Measured(DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset  # it holds ids

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            reference.mark()
            found = super()._precompute_ref_logps(*args, **kwargs)
            reference.mark()
            return found

        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())  # read after the clock has stopped
            return loss

    fields = TRL | {
        "max_length": options.max_length,
        "learning_rate": RATE,
        "gradient_accumulation_steps": options.batch // options.micro_batch,
    }
    config = DPOConfig(
        output_dir=str(place() / "trl"),
        use_cpu=True,
        bf16=options.dtype == "bf16",
        per_device_train_batch_size=options.micro_batch,
        precompute_ref_batch_size=options.reference_batch,
        max_steps=options.steps,
        **fields,
    )
    trainer = Measured(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(columns),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=_lora() if options.lora else None,
        callbacks=[Steps()],
    )
    trainer.train()
    per_step = torch.stack(losses).view(options.steps, -1).mean(1).tolist()
    return result(options, reference.between(0, 1), steps, per_step)


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of this package, with its documented API."""
    import torch

    from modern_llm import Callback
    from modern_llm.config import LoraConfig, PreferenceDatasetConfig, TrainingConfig
    from modern_llm.models.flops import IdealFlops
    from modern_llm.reference import reference_pass
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    torch.set_num_threads(options.threads)
    steps, reference, fill = Clock(), Clock(), reference_pass.fill
    count, work, rates = IdealFlops.__call__, [], [matrix_rate(time.process_time)]

    def timed(*args: Any, **named: Any) -> Any:
        reference.mark()
        found = fill(*args, **named)
        reference.mark()
        return found

    def counted(self: IdealFlops, *args: Any, training: bool) -> float:
        found = count(self, *args, training=training)
        work.append(found if training else 0.0)
        return found

    class Steps(Callback):
        def on_train_begin(self, *_: Any) -> None:
            work.clear()
            steps.mark()

        def on_step_end(self, *_: Any) -> None:
            steps.mark()

    reference_pass.fill, IdealFlops.__call__ = timed, counted
    out = place() / "ours"
    settings = TrainingConfig(
        run_name="bench",
        output_dir=out,
        batch_size=options.batch,
        max_steps=options.steps,
        learning_rate=RATE,
        schedule="constant",
        seed=SEED,
        log_every=1,
        mixed_precision="bf16" if options.dtype == "bf16" else "no",
    )
    run_dpo(
        options.model,
        settings,
        DPOConfig(beta=BETA, max_length=options.max_length),
        PreferenceDatasetConfig(dataset_name=str(options.folder / "pairs.jsonl")),
        lora_config=LoraConfig(**LORA) if options.lora else None,
        callbacks=[Steps()],
    )
    rates.append(matrix_rate(time.process_time))
    records = read_lines(out / "metrics.jsonl")
    share = sum(work) / steps.between(0, -1)[1] / max(rates)
    steps.marks.pop(0)
    found = result(options, reference.between(0, 1), steps, [r["loss"] for r in records])
    saving = sum(record["prefix_saving"] for record in records) / len(records)
    return found | {"share_of_matrix_peak": share, "prefix_saving": saving}


LORA = {"rank": 16, "alpha": 32, "targets": ("q_proj", "v_proj")}
"""Adapters as TRL makes them by default for this family."""


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=list(LORA["targets"])
    )


def _order(options: argparse.Namespace) -> list[int]:
    """Return the indices of the pairs in the order that this package trains them."""
    from modern_llm.data.batch.order import Order

    order = Order(options.steps * options.batch, options.batch, SEED)
    return [int(i) for step in range(options.steps) for i in order.step(step)]


def result(
    options: argparse.Namespace, reference: tuple[float, float], steps: Clock, losses: list[float]
) -> dict[str, Any]:
    """Return one measurement in the form that the parent process reads; a mark per step end."""
    assert len(losses) == options.steps, f"{len(losses)} losses of {options.steps} steps"
    assert len(steps.marks) == options.steps, f"{len(steps.marks)} ends of steps"
    seconds, cpu_seconds = steps.between(0, -1)
    trained = (options.steps - 1) * options.batch
    return {
        "reference_pairs_per_s": options.steps * options.batch / reference[0],
        "reference_pairs_per_cpu_s": options.steps * options.batch / reference[1],
        "training_pairs_per_s": trained / seconds,
        "training_pairs_per_cpu_s": trained / cpu_seconds,
        "peak_gb": peak_bytes() / 1e9,
        "losses": losses,
    }


SIDES = {"prepare": prepare, "trl": run_trl, "ours": run_ours}


def measure(side: str, options: argparse.Namespace, **changed: int) -> dict[str, Any]:
    """Run one side in a separate process, in a fresh folder with empty caches."""
    values = {name: getattr(options, name) for name in PASSED_ON} | changed
    return apart(__file__, side, options.folder, options.threads, **values)


def tune_trl(options: argparse.Namespace) -> dict[str, int]:
    """Try TRL's batch sizes and return the fastest for each phase."""
    sizes = [size for size in BATCHES if size <= options.batch]
    return best_sizes(
        tried_sizes(
            sizes, lambda size: measure("trl", options, micro_batch=size, reference_batch=size)
        )
    )


def table(ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> None:
    """Print minimum, median and maximum of both sides, and the ratios of the medians."""
    print(f"\n{'':28} {'ours: min / median / max':>26} {'TRL: min / median / max':>26}")
    figures = []
    for name in NAMES:
        cells = [spread((each[name] for each in side), 4) for side in (ours, trl)]
        ratio = median(ours, name) / median(trl, name)
        print(f"{name:28} {cells[0]:>26} {cells[1]:>26} {ratio:.2f}")
        if name in REQUIRED:
            figures.append(Figure(f"{name}, ours : TRL", ratio, REQUIRED[name], name != "peak_gb"))
    verdicts([*figures, *own_figures(ours)])
    off = max(abs(a - b) for a, b in zip(ours[0]["losses"], trl[0]["losses"], strict=True))
    print(f"largest difference of the losses of one step: {off:.2e}")
    if off > LOSS_BOUND:
        sys.exit(f"bench: error: not the same training, the bound is {LOSS_BOUND}")


def own_figures(ours: list[dict[str, Any]]) -> list[Figure]:
    """Return the figures that need no other side."""
    training, scoring = (
        median(ours, f"{name}_pairs_per_cpu_s") for name in ("training", "reference")
    )
    share = median(ours, "share_of_matrix_peak")
    return [
        Figure("share of the matrix peak, forward and backward", share, 0.75),
        Figure("reference pass : training, pairs per CPU second", scoring / training, 3),
    ]


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return 0
    if not options.only_ours and lacks_trl():
        return 2
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        options.folder = Path(folder)
        facts = measure("prepare", options)
        print(
            f"{options.model.name}, {options.dtype}{', LoRA' if options.lora else ''}, "
            f"{options.threads} threads; {facts['pairs']} pairs of {facts['tokens_a_pair']:.0f} "
            f"tokens (prompt once) on average, {options.batch} a step",
            flush=True,
        )
        best = {"micro_batch": options.micro_batch, "reference_batch": options.micro_batch}
        if not options.only_ours and not options.micro_batch:
            best = tune_trl(options)
            print(f"fastest for TRL here: {best}", flush=True)
        sides = {} if options.only_ours else {"TRL": lambda: measure("trl", options, **best)}
        sides["ours"] = lambda: measure("ours", options)
        found = alternating(sides, options.repeats)
        if options.only_ours:
            verdicts(own_figures(found["ours"]))
        else:
            table(found["ours"], found["TRL"])
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=3, sides=SIDES)
    found.add_argument("--model", type=Path, required=True, help="transformers folder")
    found.add_argument("--steps", type=int, default=3, help="optimizer steps a measurement")
    found.add_argument("--batch", type=int, default=8, help="pairs of an optimizer step")
    found.add_argument("--max_length", type=int, default=512, help="longer pairs are left out")
    found.add_argument("--dtype", choices=("float32", "bf16"), default="float32")
    found.add_argument("--lora", type=int, choices=(0, 1), default=0, help="1: train adapters")
    found.add_argument("--micro_batch", type=int, default=0, help="TRL's batch; 0: the fastest")
    found.add_argument("--reference_batch", type=int, default=8, help=argparse.SUPPRESS)
    found.add_argument("--only_ours", action="store_true")
    options = parsed(found)
    if options.steps < 2:
        found.error(f"--steps {options.steps}: the first step is not timed, give 2 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
