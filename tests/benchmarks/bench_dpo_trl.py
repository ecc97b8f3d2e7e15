"""DPO with a cached reference: this package against TRL's `DPOTrainer`, on a CPU.

    python tests/benchmarks/bench_dpo_trl.py [--data hh.jsonl] [--repeats 3]

Both start from one saved random Llama and train on the same pairs in the same order with the same
tokenizer, AdamW and learning rate, so that their losses must agree step by step; the script checks
that. Each measurement is a separate process, the sides alternate, and the table shows minimum,
median and maximum. TRL uses the batch sizes that are fastest for it here, found in advance; its
peak memory is also shown for its default size. The requirements refer to its defaults:
`--micro_batch 8`.

Timed: (reference) scoring all pairs and writing the values to disk; (training) from the end of the
first optimizer step to the end of the last, including batch construction. Not timed: imports,
loading, reading and tokenising data, the first step, export. Memory is the peak of the process.

TRL is not a dependency: without it the script prints how to install it and ends with status 2.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import (
    MAX_LENGTH,
    PAIRS_A_STEP,
    SEED,
    SHAPE,
    TRL,
    VOCABULARY,
    Figure,
    Timer,
    alternating,
    apart,
    best_sizes,
    lacks_trl,
    longest,
    median,
    parsed,
    parser,
    peak_bytes,
    place,
    read_lines,
    read_transcripts,
    spread,
    train_ours,
    tried_sizes,
    verdicts,
    write_lines,
    write_model,
    write_tokenizer,
)

MICRO_BATCHES = (8, 4, 2, 1)
LOSS_BOUND = 1e-3
"""Largest relative difference of losses of the same step: rounding, accumulated over steps."""
REQUIRED = {"training_pairs_per_s": 4.8, "reference_pairs_per_s": 6.0, "peak_gb": 0.28}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write tokenizer, model and pairs for both sides; return counts of pairs."""
    pairs = read_transcripts(options.data)
    tokenizer = write_tokenizer(pairs, options.folder / "model", VOCABULARY)
    write_model(options.folder / "model", VOCABULARY)
    # The sides truncate over-long pairs differently; without those they do exactly the same work.
    sizes = [longest(tokenizer, pair) for pair in pairs]
    fitting = [pair for pair, size in zip(pairs, sizes, strict=True) if size <= MAX_LENGTH]
    chosen = random.Random(SEED).sample(fitting, min(options.steps * PAIRS_A_STEP, len(fitting)))
    if len(chosen) < options.steps * PAIRS_A_STEP:
        sys.exit(
            f"bench: error: {options.data} holds {len(fitting)} pairs of at most {MAX_LENGTH} "
            f"tokens, {options.steps} steps need {options.steps * PAIRS_A_STEP}; lower --steps"
        )
    write_lines(options.folder / "pairs.jsonl", chosen)
    return {"pairs": len(chosen), "too_long": len(pairs) - len(fitting)}


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of TRL, with its defaults except for the arguments set here."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from modern_llm.data.batch.order import Order

    torch.set_num_threads(options.threads)
    pairs = read_lines(options.folder / "pairs.jsonl")
    order = Order(len(pairs), PAIRS_A_STEP, SEED)
    ordered = [pairs[i] for step in range(options.steps) for i in order.step(step)]
    times, losses, reference = [], [], Timer()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class Measured(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Dataset:
            return reference.time(super()._precompute_ref_logps, *args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())  # read after the clock has stopped
            return loss

    config = DPOConfig(
        output_dir=str(place() / "trl"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=PAIRS_A_STEP // options.micro_batch,
        precompute_ref_batch_size=options.reference_batch,
        max_steps=options.steps,
        **TRL,
    )
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32)
    trainer = Measured(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(ordered),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"),
        callbacks=[Clock()],
    )
    rows = trainer.train_dataset
    tokens = sum(
        len(r["prompt_ids"]) * 2 + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows
    )
    trainer.train()
    per_step = torch.stack(losses).view(options.steps, -1).mean(1).tolist()
    return result(options, reference.seconds, times[-1] - times[0], per_step, tokens)


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of this package, with its documented API."""
    folder, out = options.folder, place() / "ours"
    return train_ours(
        folder, folder / "pairs.jsonl", out, steps=options.steps, threads=options.threads
    )


def result(
    options: argparse.Namespace,
    reference_seconds: float,
    training_seconds: float,
    losses: list[float],
    tokens: int | None,
) -> dict[str, Any]:
    """Return one measurement in the form that the parent process reads."""
    assert len(losses) == options.steps, f"{len(losses)} losses of {options.steps} steps"
    return {
        "reference_pairs_per_s": options.steps * PAIRS_A_STEP / reference_seconds,
        "training_pairs_per_s": (options.steps - 1) * PAIRS_A_STEP / training_seconds,
        "peak_gb": peak_bytes() / 1e9,
        "losses": losses,
        "tokens": tokens,
    }


SIDES = {"prepare": prepare, "trl": run_trl, "ours": run_ours}


def measure(side: str, options: argparse.Namespace, **changed: int) -> dict[str, Any]:
    """Run one side in a separate process, in a fresh folder with empty caches."""
    names = ("data", "steps", "micro_batch", "reference_batch")
    values = {name: getattr(options, name) for name in names} | changed
    return apart(__file__, side, options.folder, options.threads, **values)


def tune_trl(options: argparse.Namespace) -> dict[str, int]:
    """Try TRL's batch sizes and return the fastest for each phase."""
    found = tried_sizes(
        MICRO_BATCHES,
        lambda size: measure("trl", options, micro_batch=size, reference_batch=size),
    )
    best = best_sizes(found)
    default = found[8]["peak_gb"]
    print(
        f"fastest for TRL here: {best}; its default is 8 for both, with a peak of {default:.3f} GB"
    )
    return best


def table(ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> None:
    """Print minimum, median and maximum of both sides, and the ratio of the medians."""
    print(f"\n{'':22} {'ours: min / median / max':>28} {'TRL: min / median / max':>28}")
    figures = []
    for name, required in REQUIRED.items():
        cells = [spread((each[name] for each in side), 3) for side in (ours, trl)]
        print(f"{name:22} {cells[0]:>28} {cells[1]:>28}")
        ratio = median(ours, name) / median(trl, name)
        figures.append(Figure(f"{name}, ours : TRL", ratio, required, name != "peak_gb"))
    verdicts(figures)
    off = max(abs(a - b) for a, b in zip(ours[0]["losses"], trl[0]["losses"], strict=True))
    verdict = "the same training" if off <= LOSS_BOUND else f"NOT the same (bound {LOSS_BOUND})"
    print(f"largest difference of the losses of one step: {off:.2e}: {verdict}")


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
            f"Llama {SHAPE}, vocabulary {VOCABULARY}, float32, {options.threads} threads; "
            f"{facts['pairs']} pairs, {PAIRS_A_STEP} a step; {facts['too_long']} pairs of the file "
            f"have more than {MAX_LENGTH} tokens and were left out",
            flush=True,
        )
        tune = not options.only_ours and not options.micro_batch
        best = tune_trl(options) if tune else {}
        sides = {"TRL": lambda: measure("trl", options, **best)} if not options.only_ours else {}
        if not options.only_trl:
            sides["ours"] = lambda: measure("ours", options, **best)
        found = alternating(sides, options.repeats)
        if len(found) == 2:
            table(found["ours"], found["TRL"])
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=3, sides=SIDES)
    found.add_argument("--steps", type=int, default=12, help="optimizer steps a measurement")
    sizes = (0, *MICRO_BATCHES)
    found.add_argument("--micro_batch", type=int, default=0, choices=sizes, help="TRL's; 0: best")
    found.add_argument("--reference_batch", type=int, default=8, help="TRL's, beside micro_batch")
    found.add_argument("--only_trl", action="store_true")
    found.add_argument("--only_ours", action="store_true")
    options = parsed(found)
    if options.steps < 2:
        found.error(f"--steps {options.steps}: the first step is not timed, give 2 or more")
    return options


if __name__ == "__main__":
    sys.exit(main())
