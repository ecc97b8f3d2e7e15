"""DPO with a cached reference: this package beside TRL's `DPOTrainer`, on a CPU, in one run.

    python tests/benchmarks/bench_dpo_trl.py [--data hh.jsonl] [--repeats 3]

Both start from one saved random Llama and train on the same pairs in the same order with the same
tokenizer, AdamW and rate, so that their losses must agree step by step; the script checks that.
Each measurement is a process of its own, the sides alternate, and the table gives minimum, median
and maximum. TRL is given the batch sizes that are fastest for it here, found beforehand; its peak
memory is also told for the size that it has by default.

What is timed: (reference) scoring all pairs and writing the values to disk; (training) from the end
of the first optimizer step to the end of the last, making the batches included. Not timed: imports,
loading, reading and tokenising data, the first step, export. Memory is the peak of the process.

TRL is no dependency of the package: without it this says how to install it and ends with status 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAIRS_A_STEP = 8
MAX_LENGTH = 512
VOCABULARY = 4096
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2 * MAX_LENGTH,
}
BETA, RATE, SEED = 0.1, 1e-4, 42
END = "<|end|>"
MICRO_BATCHES = (8, 4, 2, 1)
LOSS_BOUND = 1e-3
"""How far losses of the same step may be apart: rounding, grown over the steps before."""
REQUIRED = {"training_pairs_per_s": 4.8, "reference_pairs_per_s": 6.0, "peak_gb": 0.28}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the tokenizer, model and pairs that both sides start from; return counts of pairs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    pairs = read_transcripts(options.data)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(options.folder / "model")
    set_seed(SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE, **ends)).save_pretrained(
        options.folder / "model"
    )
    # The two sides cut over-long pairs at different ends; without those they do the very same work.
    sizes = [longest(tokenizer, pair) for pair in pairs]
    fitting = [pair for pair, size in zip(pairs, sizes, strict=True) if size <= MAX_LENGTH]
    chosen = random.Random(SEED).sample(fitting, min(options.steps * PAIRS_A_STEP, len(fitting)))
    if len(chosen) < options.steps * PAIRS_A_STEP:
        sys.exit(
            f"bench: error: {options.data} holds {len(fitting)} pairs of at most {MAX_LENGTH} "
            f"tokens, {options.steps} steps need {options.steps * PAIRS_A_STEP}; lower --steps"
        )
    lines = "".join(json.dumps(pair) + "\n" for pair in chosen)
    (options.folder / "pairs.jsonl").write_text(lines, encoding="utf-8")
    return {"pairs": len(chosen), "too_long": len(pairs) - len(fitting)}


def read_transcripts(path: Path) -> list[dict[str, str]]:
    """HH transcripts split at the last assistant turn, without those that are no preference."""
    turn = "\n\nAssistant:"
    pairs = []
    for row in read_lines(path):
        prompt, _, chosen = row["chosen"].rpartition(turn)
        other, _, rejected = row["rejected"].rpartition(turn)
        if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
            pairs.append({"prompt": prompt + turn, "chosen": chosen, "rejected": rejected})
    return pairs


def longest(tokenizer: Any, pair: dict[str, str]) -> int:
    """Tokens of prompt and the longer answer, end token included."""
    prompt, *answers = (
        len(tokenizer(pair[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")
    )
    return prompt + max(answers) + 1


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement of TRL, with its defaults but for what is said here."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from modern_llm.data.plan import Order

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
        output_dir=str(options.folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=PAIRS_A_STEP // options.micro_batch,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=options.reference_batch,
        max_length=MAX_LENGTH,
        beta=BETA,
        max_steps=options.steps,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.01,
        train_sampling_strategy="sequential",  # the rows stand in the order of the other side
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
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
    """One measurement of this package, through its documented API."""
    import torch

    from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
    from modern_llm.training import reference_pass
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    torch.set_num_threads(options.threads)
    reference = Timer()
    fill = reference_pass.fill
    reference_pass.fill = lambda *args, **options: reference.time(fill, *args, **options)
    run = options.folder / "ours"
    run_dpo(
        options.folder / "model",
        TrainingConfig(
            run_name="bench",
            output_dir=run,
            batch_size=PAIRS_A_STEP,
            max_steps=options.steps,
            learning_rate=RATE,
            schedule="constant",
            seed=SEED,
            log_every=1,
        ),
        DPOConfig(beta=BETA, max_length=MAX_LENGTH),
        PreferenceDatasetConfig(dataset_name=str(options.folder / "pairs.jsonl")),
    )
    steps = read_lines(run / "metrics.jsonl")
    seconds = steps[-1]["elapsed_s"] - steps[0]["elapsed_s"]
    return result(options, reference.seconds, seconds, [step["loss"] for step in steps], None)


class Timer:
    """Seconds spent in calls."""

    seconds = 0.0

    def time(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` and add the time that it took."""
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def result(
    options: argparse.Namespace,
    reference_seconds: float,
    training_seconds: float,
    losses: list[float],
    tokens: int | None,
) -> dict[str, Any]:
    """One measurement as the parent reads it."""
    assert len(losses) == options.steps, f"{len(losses)} losses of {options.steps} steps"
    return {
        "reference_pairs_per_s": options.steps * PAIRS_A_STEP / reference_seconds,
        "training_pairs_per_s": (options.steps - 1) * PAIRS_A_STEP / training_seconds,
        "peak_gb": peak_bytes() / 1e9,
        "losses": losses,
        "tokens": tokens,
    }


def peak_bytes() -> int:
    """Peak resident memory of this process; on Linux getrusage begins with the parent's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


SIDES = {"prepare": prepare, "trl": run_trl, "ours": run_ours}


def measure(side: str, options: argparse.Namespace, **changed: int) -> dict[str, Any]:
    """Run one side in a process of its own, in a fresh folder with empty caches."""
    values = {name: str(value) for name, value in (vars(options) | changed).items()}
    arguments = [f"--{name}={values[name]}" for name in ("data", "steps", "threads")]
    arguments += [f"--{name}={values[name]}" for name in ("micro_batch", "reference_batch")]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        place = Path(folder)
        if side != "prepare":
            for name in ("model", "pairs.jsonl"):
                (place / name).symlink_to(options.folder / name)
        caches = {
            "MODERN_LLM_CACHE": str(place / "reference"),
            "HF_DATASETS_CACHE": str(place / "datasets"),
            "OMP_NUM_THREADS": values["threads"],
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": str(ROOT),
        }
        target = options.folder if side == "prepare" else place
        command = [sys.executable, __file__, "--side", side, "--folder", str(target), *arguments]
        done = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
        if done.returncode:
            sys.exit(
                f"bench: error: side {side} ended with {done.returncode}:\n{done.stderr[-4000:]}"
            )
        return json.loads(done.stdout.splitlines()[-1])


def tune_trl(options: argparse.Namespace) -> dict[str, int]:
    """Try TRL's batch sizes and return the fastest for each phase."""
    found = {}
    for size in MICRO_BATCHES:
        found[size] = measure("trl", options, micro_batch=size, reference_batch=size)
        say(f"TRL with micro-batches of {size}", found[size])
    best = {
        "micro_batch": max(found, key=lambda size: found[size]["training_pairs_per_s"]),
        "reference_batch": max(found, key=lambda size: found[size]["reference_pairs_per_s"]),
    }
    default = found[8]["peak_gb"]
    print(
        f"fastest for TRL here: {best}; its default is 8 for both, with a peak of {default:.3f} GB"
    )
    return best


def say(what: str, measured: dict[str, Any]) -> None:
    """One line on one measurement."""
    print(
        f"{what}: reference {measured['reference_pairs_per_s']:.2f} pairs/s, training "
        f"{measured['training_pairs_per_s']:.2f} pairs/s, peak {measured['peak_gb']:.3f} GB",
        flush=True,
    )


def table(ours: list[dict[str, Any]], trl: list[dict[str, Any]]) -> None:
    """Print minimum, median and maximum of both sides, and the ratio of the medians."""
    print(
        f"\n{'':22} {'ours: min / median / max':>28} {'TRL: min / median / max':>28}   ours : TRL"
    )
    for name in ("reference_pairs_per_s", "training_pairs_per_s", "peak_gb"):
        cells, medians = [], []
        for side in (ours, trl):
            values = sorted(measured[name] for measured in side)
            medians.append(statistics.median(values))
            cells.append(f"{values[0]:.3f} / {medians[-1]:.3f} / {values[-1]:.3f}")
        need = REQUIRED.get(name)
        word = "" if need is None else f"  (required {'<=' if name == 'peak_gb' else '>='} {need})"
        print(f"{name:22} {cells[0]:>28} {cells[1]:>28}   {medians[0] / medians[1]:.2f}{word}")
    apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], trl[0]["losses"], strict=True))
    verdict = "the same training" if apart <= LOSS_BOUND else f"NOT the same (bound {LOSS_BOUND})"
    print(f"largest difference of the losses of one step: {apart:.2e}: {verdict}")


def main() -> int:
    """Measure, or be one measurement (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(SIDES[options.side](options)))
        return 0
    if not options.only_ours and importlib.util.find_spec("trl") is None:
        print(
            "bench: error: TRL is not installed, which this compares with; install it with\n"
            "  pip install trl==1.16.0 -c constraints.txt",
            file=sys.stderr,
        )
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
        trl, ours = [], []
        for repeat in range(1, options.repeats + 1):
            if not options.only_ours:
                trl.append(measure("trl", options, **best))
                say(f"TRL  {repeat}", trl[-1])
            if not options.only_trl:
                ours.append(measure("ours", options, **best))
                say(f"ours {repeat}", ours[-1])
        if trl and ours:
            table(ours, trl)
    return 0


def parse() -> argparse.Namespace:
    """Options of the whole, and those by which it calls itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/hh_rlhf_sample.jsonl")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps a measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2)
    sizes = (0, *MICRO_BATCHES)
    parser.add_argument("--micro_batch", type=int, default=0, choices=sizes, help="TRL's; 0: best")
    parser.add_argument("--reference_batch", type=int, default=8, help="TRL's, beside micro_batch")
    parser.add_argument("--only_trl", action="store_true")
    parser.add_argument("--only_ours", action="store_true")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error(f"--steps {options.steps}: the first step is not timed, give 2 or more")
    if not options.data.is_file():
        parser.error(
            f"--data {options.data}: there is no such file; give HH-RLHF transcripts as .jsonl"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
