"""Every preference loss and option against TRL's `DPOTrainer`: equal losses, step by step.

    bash launch/test.sh --parity [--data hh.jsonl] [--only sigmoid ...]

Both sides start from one random Llama and train on the same real pairs in the same order. Each case
runs 20 steps on both; the losses of every step must agree within 1e-4, relative above 1. The table
says of each option whether it is equal, not in TRL, or different on purpose, and why. The status is
1 if a case that should be equal is not.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from measuring import (  # noqa: E402
    DATA,
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

STEPS, MAX_TOKENS, VOCABULARY, RATE = 20, 192, 1024, 3e-4
SHAPE = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2}
BOUND = 1e-4
MPO = ["sigmoid", "bco_pair", "sft"]


@dataclass(frozen=True)
class Case:
    """One option: its settings on both sides; `theirs` None where TRL has none."""

    name: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] | None = None
    why: str = ""
    """Why the sides differ on purpose."""


def same(name: str, **options: Any) -> Case:
    """A case whose options have the same names and values on both sides."""
    theirs = dict(options)
    if isinstance(options.get("loss_type"), str):
        theirs["loss_type"] = [options["loss_type"]]
    return Case(name, options, theirs)


PLAIN = "sigmoid hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down".split()
CASES = (
    *(same(f"loss_type: {name}", loss_type=name) for name in (*PLAIN, "sigmoid_norm", "sft")),
    same("loss_type: robust, label_smoothing", loss_type="robust", label_smoothing=0.2),
    same("loss_type: exo_pair, label_smoothing", loss_type="exo_pair", label_smoothing=0.05),
    same("loss_type: aot, label_smoothing", loss_type="aot", label_smoothing=0.1),
    same("loss_type: discopop, discopop_tau", loss_type="discopop", discopop_tau=0.3),
    same("loss_type: [sigmoid, bco_pair, sft] (MPO)", loss_type=MPO),
    same("loss_weights", loss_type=MPO, loss_weights=[0.8, 0.2, 1.0]),
    same("ld_alpha", ld_alpha=0.5),
    same("use_weighting (WPO)", use_weighting=True),
    same("use_weighting of a list", use_weighting=True, loss_type=["ipo", "sigmoid"]),
    # TRL 1.16 fails: it multiplies an expanded tensor in place.
    Case("use_weighting with sft", {"use_weighting": True, "loss_type": ["sigmoid", "sft"]}),
    *(
        Case(f"f_divergence: {kind}", {"f_divergence": kind}, {"f_divergence_type": kind})
        for kind in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
    Case(
        "f_divergence: alpha_divergence, f_alpha",
        {"f_divergence": "alpha_divergence", "f_alpha": 0.2, "loss_type": ["ipo", "sft"]},
        {
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.2,
            "loss_type": ["ipo", "sft"],
        },
    ),
    Case(
        "reference_sync_every, reference_mixup (TR-DPO)",
        {"reference_sync_every": 4, "reference_mixup": 0.6},
        {
            "sync_ref_model": True,
            "ref_model_sync_steps": 4,
            "ref_model_mixup_alpha": 0.6,
            "precompute_ref_log_probs": False,
        },
    ),
    Case(
        "loss_type: sigmoid, label_smoothing",
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1},
        "TRL's sigmoid ignores it; here it is cDPO",
    ),
    Case("loss_type: simpo", {"loss_type": "simpo"}),
    Case("loss_type: orpo", {"loss_type": "orpo"}),
    Case("loss_type: dpop", {"loss_type": "dpop"}),
    Case("nll_coefficient", {"nll_coefficient": 0.2}),
)


def prepare(folder: Path, data: Path) -> list[dict[str, str]]:
    """Write tokenizer, model and pairs; return the pairs in the order of the steps."""
    from modern_llm.data.batch.order import Order

    pairs = read_transcripts(data)
    tokenizer = write_tokenizer(pairs, folder / "model", VOCABULARY)
    write_model(folder / "model", VOCABULARY, **SHAPE)
    # The sides truncate over-long pairs differently.
    fitting = [pair for pair in pairs if longest(tokenizer, pair) <= MAX_TOKENS]
    chosen = random.Random(SEED).sample(fitting, STEPS * PAIRS_A_STEP)
    write_lines(folder / "pairs.jsonl", chosen)
    order = Order(len(chosen), PAIRS_A_STEP, SEED)
    return [chosen[i] for step in range(STEPS) for i in order.step(step)]


def run_trl(folder: Path, out: Path, pairs: list[dict[str, str]], options: Any) -> list[float]:
    """Return TRL's loss of every step."""
    from trl import DPOConfig, DPOTrainer

    settings = TRL | {"learning_rate": RATE, "max_length": MAX_TOKENS} | options
    config = DPOConfig(
        output_dir=str(out),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=PAIRS_A_STEP,
        precompute_ref_batch_size=PAIRS_A_STEP,
        max_steps=STEPS,
        **settings,
    )
    return trl_losses(DPOTrainer, config, folder, pairs)


def trl_losses(trainer: type, config: Any, folder: Path, rows: list[dict[str, Any]]) -> list[float]:
    """Train with a trainer of TRL; return the loss of every micro-batch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    losses: list[float] = []

    class Noted(trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    Noted(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    ).train()
    return losses


def our_training(out: Path) -> Any:
    """Return the configuration of this package's side, in micro-batches of its choice."""
    from modern_llm.config import TrainingConfig

    return TrainingConfig(
        run_name="parity",
        output_dir=out,
        batch_size=PAIRS_A_STEP,
        micro_batch_size=3,
        max_steps=STEPS,
        learning_rate=RATE,
        schedule="constant",
        seed=SEED,
        log_every=1,
    )


def run_ours(folder: Path, out: Path, options: Any) -> list[float]:
    """Return the loss of every step of this package, in micro-batches of its choice."""
    from modern_llm.config import PreferenceDatasetConfig
    from modern_llm.training.train_dpo import DPOConfig, run_dpo

    run_dpo(
        folder / "model",
        our_training(out),
        DPOConfig(max_length=MAX_TOKENS, **options),
        PreferenceDatasetConfig(dataset_name=str(folder / "pairs.jsonl")),
    )
    return [record["loss"] for record in read_lines(out / "metrics.jsonl")]


def compare(
    case: Case,
    folder: Path,
    out: Path,
    rows: list[dict[str, Any]],
    run_ours: Callable[..., list[float]] = run_ours,
    run_trl: Callable[..., list[float]] = run_trl,
) -> tuple[str, bool]:
    """Run a case; return the cell of the table, and whether it is as it should be."""
    ours = run_ours(folder, out / "ours", case.ours)
    assert len(ours) == STEPS, f"{len(ours)} losses of {STEPS} steps"
    if case.theirs is None:
        return "not in TRL", True
    theirs = run_trl(folder, out / "trl", rows, case.theirs)
    off = max(abs(a - b) / max(1, abs(b)) for a, b in zip(ours, theirs, strict=True))
    if case.why:
        return f"differs on purpose: {case.why}", off > BOUND
    return (f"equal ({off:.0e})", True) if off <= BOUND else (f"NOT EQUAL ({off:.1e})", False)


def main(
    cases: Sequence[Case] = CASES,
    prepare: Callable[..., list[dict[str, Any]]] = prepare,
    about: str = __doc__,
    what: str = "real pairs",
    **sides: Callable[..., list[float]],
) -> int:
    """Run the cases and print the table."""
    found = argparse.ArgumentParser(description=about.splitlines()[0])
    found.add_argument("--data", type=Path, default=DATA, help="HH-RLHF transcripts (.jsonl)")
    found.add_argument("--only", nargs="*", default=[], help="words in the names of the cases")
    options = found.parse_args()
    if not options.data.is_file():
        found.error(f"--data {options.data}: there is no such file")
    if importlib.util.find_spec("trl") is None:
        found.error("TRL is not installed: run it by `bash launch/test.sh --parity`")
    logging.disable(logging.INFO)
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="parity-") as place:
        folder = Path(place)
        os.environ["MODERN_LLM_CACHE"] = str(folder / "reference")
        rows = prepare(folder, options.data)
        print(f"| option ({STEPS} steps of {PAIRS_A_STEP} {what}) | against TRL |\n|---|---|")
        for number, case in enumerate(cases):
            if options.only and not any(word in case.name for word in options.only):
                continue
            with redirect_stdout(io.StringIO()):  # the lines of every step
                cell, right = compare(case, folder, folder / f"case-{number}", rows, **sides)
            wrong += not right
            print(f"| `{case.name}` | {cell} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
