"""KTO and its options against TRL's `KTOTrainer`: equal losses, step by step.

    bash launch/test.sh --parity [--data hh.jsonl] [--only kto ...]

As `dpo_trl`, on rows of one response and a label, made of real pairs with different prompts. Both
sides make their own mismatched responses.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import dpo_trl  # noqa: E402
from dpo_trl import MAX_TOKENS, RATE, SHAPE, STEPS, VOCABULARY, Case  # noqa: E402
from measuring import (  # noqa: E402
    PAIRS_A_STEP,
    SEED,
    TRL,
    longest,
    read_lines,
    read_transcripts,
    write_lines,
    write_model,
    write_tokenizer,
)


def same(name: str, **options: Any) -> Case:
    """A case whose options have the same names and values on both sides."""
    return Case(name, options, dict(options))


CASES = (
    same("kto"),
    same("kto: beta", beta=0.5),
    same("kto: desirable_weight, undesirable_weight", desirable_weight=1.5, undesirable_weight=0.5),
    same("kto: apo_zero_unpaired", loss_type="apo_zero_unpaired"),
    Case("kto: a reference model in every step", {"reference": "model"}, {"precompute": False}),
    Case(
        "kto: gradient accumulation",
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": PAIRS_A_STEP // 2},
        "TRL estimates the KL in each micro-batch, here over the whole step",
    ),
)


def prepare(folder: Path, data: Path) -> list[dict[str, Any]]:
    """Write tokenizer, model and rows; return the rows in the order of the steps."""
    from modern_llm.data.batch.order import Order

    pairs = read_transcripts(data)
    tokenizer = write_tokenizer(pairs, folder / "model", VOCABULARY)
    write_model(folder / "model", VOCABULARY, **SHAPE)
    fitting = [pair for pair in pairs if longest(tokenizer, pair) <= MAX_TOKENS]
    # A prompt that two rows of a step share is left out here and used by TRL.
    fitting = list({pair["prompt"]: pair for pair in fitting}.values())
    rng = random.Random(SEED)
    rows = []
    for pair in rng.sample(fitting, STEPS * PAIRS_A_STEP):
        good = rng.random() < 0.7
        side = "chosen" if good else "rejected"
        rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": good})
    write_lines(folder / "rows.jsonl", rows)
    order = Order(len(rows), PAIRS_A_STEP, SEED)
    return [rows[i] for step in range(STEPS) for i in order.step(step)]


def run_trl(folder: Path, out: Path, rows: list[dict[str, Any]], options: Any) -> list[float]:
    """Return TRL's loss of every step, a mean over its micro-batches."""
    from trl import KTOConfig, KTOTrainer

    settings = TRL | {"learning_rate": RATE, "max_length": MAX_TOKENS}
    settings |= {"per_device_train_batch_size": PAIRS_A_STEP} | options
    settings["precompute_ref_log_probs"] = settings.pop("precompute", True)
    config = KTOConfig(output_dir=str(out), use_cpu=True, bf16=False, max_steps=STEPS, **settings)
    losses = dpo_trl.trl_losses(KTOTrainer, config, folder, rows)
    each = len(losses) // STEPS
    return [sum(losses[at : at + each]) / each for at in range(0, len(losses), each)]


def run_ours(folder: Path, out: Path, options: Any) -> list[float]:
    """Return the loss of every step of this package, in micro-batches of its choice."""
    from modern_llm.config import LabelledDatasetConfig
    from modern_llm.training.train_kto import KTOConfig, run_kto

    run_kto(
        folder / "model",
        dpo_trl.our_training(out),
        KTOConfig(max_length=MAX_TOKENS, **options),
        LabelledDatasetConfig(dataset_name=str(folder / "rows.jsonl")),
    )
    return [record["loss"] for record in read_lines(out / "metrics.jsonl")]


if __name__ == "__main__":
    sides = {"run_ours": run_ours, "run_trl": run_trl}
    sys.exit(dpo_trl.main(CASES, prepare, __doc__ or "", "real responses", **sides))
