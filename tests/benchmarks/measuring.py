"""Helpers shared by the benchmarks of speed and memory.

Measurements in separate processes, alternating sides, a table of figures with their requirements,
and the small Llama, tokenizer and pairs of all scripts. The scripts are run as files."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data/hh_rlhf_sample.jsonl"
GPT2 = ROOT / "../shared/tokenizers/gpt2"
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
TURN = "\n\nAssistant:"

Measured = dict[str, Any]

TRL = {
    "gradient_checkpointing": False,
    "precompute_ref_log_probs": True,
    "max_length": MAX_LENGTH,
    "beta": BETA,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "adam_beta2": 0.95,
    "weight_decay": 0.01,
    "train_sampling_strategy": "sequential",  # rows in the order of the other side
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": SEED,
}
"""Fields of TRL's `DPOConfig` that make it the same training."""


def parser(text: str, *, repeats: int, sides: Iterable[str] | None = None) -> Any:
    """Return a parser with the options of every script, and hidden ones for a single measurement.

    Args:
        text: docstring of the script; its first line is the help text.
        sides: allowed values of `--side`; None allows any.
    """
    found = argparse.ArgumentParser(description=text.splitlines()[0])
    found.add_argument("--data", type=Path, default=DATA)
    found.add_argument("--repeats", type=int, default=repeats, help="measurements of each side")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    found.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return found


def parsed(found: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; the data file must exist."""
    options = found.parse_args()
    if not options.data.is_file():
        found.error(
            f"--data {options.data}: there is no such file; give HH-RLHF transcripts as .jsonl"
        )
    return options


@dataclass(frozen=True)
class Figure:
    """A measured number with its requirement."""

    name: str
    value: float
    required: float
    at_least: bool = True
    unit: str = ""

    @property
    def reached(self) -> bool:
        """Whether the requirement is met."""
        return self.value >= self.required if self.at_least else self.value <= self.required

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        word = "reached" if self.reached else "MISSED"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.name}: {self.value:,.4g}{unit} (required {sign} {self.required:,g}): {word}"


def verdicts(figures: Iterable[Figure]) -> None:
    """Print every figure with its requirement."""
    print()
    for figure in figures:
        print(figure)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return minimum / median / maximum as text."""
    ordered = sorted(values)
    three = (ordered[0], statistics.median(ordered), ordered[-1])
    return " / ".join(f"{value:,.{digits}f}" for value in three)


def median(measured: Iterable[Measured], name: str) -> float:
    """Return the median of one number over several measurements."""
    return statistics.median(each[name] for each in measured)


def alternating(
    sides: Mapping[str, Callable[[], Measured]], repeats: int
) -> dict[str, list[Measured]]:
    """Measure every side in turn, `repeats` times; print each measurement."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for repeat in range(1, repeats + 1):
        for name, measure in sides.items():
            found[name].append(measure())
            say(f"{name} {repeat}", found[name][-1])
    return found


def lacks_trl() -> bool:
    """Return whether TRL is missing, after telling how to install it."""
    if importlib.util.find_spec("trl") is not None:
        return False
    print(
        "bench: error: TRL is not installed, which this compares with; install it with\n"
        "  pip install trl==1.16.0 -c constraints.txt",
        file=sys.stderr,
    )
    return True


def tried_sizes(sizes: Iterable[int], measure: Callable[[int], Measured]) -> dict[int, Measured]:
    """Measure TRL with each batch size, and print it."""
    found = {}
    for size in sizes:
        found[size] = measure(size)
        say(f"TRL with batches of {size}", found[size])
    return found


def best_sizes(found: Mapping[int, Measured]) -> dict[str, int]:
    """Return the batch sizes that are fastest in training and in the reference pass."""
    phases = {"micro_batch": "training", "reference_batch": "reference"}
    return {
        name: max(found, key=lambda size: found[size][f"{phase}_pairs_per_s"])
        for name, phase in phases.items()
    }


def say(what: str, measured: Measured) -> None:
    """Return one line about a measurement: its plain numbers."""
    numbers = [f"{k} {v:,.4g}" for k, v in measured.items() if isinstance(v, (int, float))]
    print(f"{what}: {', '.join(numbers)}", flush=True)


def apart(script: str, side: str, folder: Path, threads: int, **options: Any) -> Measured:
    """Run one side of a script in a separate process, with empty caches.

    Args:
        folder: passed to the process as `--folder`; holds the output of `prepare`.
        options: passed as `--name=value`.

    Returns:
        The last line that the process printed, a JSON object.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        settings = {
            "MODERN_LLM_CACHE": f"{place}/reference",
            "HF_DATASETS_CACHE": f"{place}/datasets",
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "PYTHONPATH": str(ROOT),
            "BENCH_PLACE": place,
        }
        # Threads of the tokenizer are not measured, unless a script sets them.
        settings["TOKENIZERS_PARALLELISM"] = os.environ.get("TOKENIZERS_PARALLELISM", "false")
        words = [f"--{name}={value}" for name, value in options.items()]
        done = subprocess.run(
            [sys.executable, script, f"--side={side}", f"--folder={folder}", *words],
            env=os.environ | settings,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(f"bench: error: side {side} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def place() -> Path:
    """Yield an empty folder for one measurement, removed after it."""
    return Path(os.environ["BENCH_PLACE"])


class Timer:
    """Seconds spent in calls."""

    seconds = 0.0

    def time(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function` and add its time."""
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - began


def peak_bytes() -> int:
    """Return the peak resident memory of this process; Linux getrusage starts with the parent's
    peak."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def matrix_rate(clock: Callable[[], float]) -> float:
    """Return operations per second of a large float32 product, the best of a few on this clock."""
    import torch

    side = torch.ones(1024, 1024)
    out = torch.mm(side, side)
    best = float("inf")
    for _ in range(8):
        began = clock()
        torch.mm(side, side, out=out)
        best = min(best, clock() - began)
    return 2 * 1024**3 / best


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write objects as .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_transcripts(path: Path) -> list[dict[str, str]]:
    """Return HH transcripts split at the last assistant turn, without invalid pairs."""
    pairs = []
    for row in read_lines(path):
        prompt, _, chosen = row["chosen"].rpartition(TURN)
        other, _, rejected = row["rejected"].rpartition(TURN)
        if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
            pairs.append({"prompt": prompt + TURN, "chosen": chosen, "rejected": rejected})
    return pairs


def longest(tokenizer: Any, pair: dict[str, str]) -> int:
    """Return the tokens of prompt and longer answer, end token included."""
    prompt, *answers = (
        len(tokenizer(pair[name])["input_ids"]) for name in ("prompt", "chosen", "rejected")
    )
    return prompt + max(answers) + 1


def write_tokenizer(pairs: list[dict[str, str]], folder: Path, vocabulary: int) -> Any:
    """Train a byte-level BPE on the texts of `pairs`, write it, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator((text for pair in pairs for text in pair.values()), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, vocabulary: int, **shape: int) -> None:
    """Write a random Llama of `SHAPE`, changed by the arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(SEED)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=vocabulary, **(SHAPE | shape), **ends)
    LlamaForCausalLM(config).save_pretrained(folder)


def train_ours(
    folder: Path, pairs: Path, out: Path, *, steps: int, threads: int, **changes: Any
) -> Measured:
    """Run DPO with the documented API and measure it.

    Not timed: the first step, imports, loading, reading and tokenising. Memory is the peak of the
    whole process.

    Args:
        folder: contains `model`.
        changes: fields of `TrainingConfig`; `group_by_prompt` is one of `DPOConfig`.
    """
    import torch

    from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
    from modern_llm.reference import reference_pass
    from modern_llm.training import stage
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    torch.set_num_threads(threads)
    reference, fill = Timer(), reference_pass.fill
    if not torch.cuda.is_available():  # a run on a CPU has no `mfu`
        stage.peak_flops = lambda *_: (matrix_rate(time.perf_counter), "the benchmark")
    reference_pass.fill = lambda *args, **options: reference.time(fill, *args, **options)
    settings = {
        "run_name": "bench",
        "output_dir": out,
        "batch_size": PAIRS_A_STEP,
        "max_steps": steps,
        "learning_rate": RATE,
        "schedule": "constant",
        "seed": SEED,
        "log_every": 1,
    }
    dpo = {"beta": BETA, "max_length": MAX_LENGTH}
    dpo |= {k: changes.pop(k) for k in ("group_by_prompt", "max_length") if k in changes}
    run_dpo(
        folder / "model",
        TrainingConfig(**(settings | changes)),
        DPOConfig(**dpo),
        PreferenceDatasetConfig(dataset_name=str(pairs)),
    )
    records = read_lines(out / "metrics.jsonl")
    assert len(records) == steps, f"{len(records)} records of {steps} steps"
    seconds = records[-1]["elapsed_s"] - records[0]["elapsed_s"]
    return {
        "reference_pairs_per_s": len(read_lines(pairs)) / reference.seconds,
        "training_pairs_per_s": (steps - 1) * PAIRS_A_STEP / seconds,
        "peak_gb": peak_bytes() / 1e9,
        "mfu": statistics.median(record["mfu"] for record in records[1:]),
        "prefix_saving": statistics.mean(record["prefix_saving"] for record in records),
        "losses": [record["loss"] for record in records],
    }
