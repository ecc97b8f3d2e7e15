"""The demo: pretrain -> SFT -> reference pass -> DPO on a generated corpus, then a table.

It uses the ordinary stages and files of the package, as a user would.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modern_llm.config import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    ModernLLMConfig,
    PreferenceDatasetConfig,
    TrainingConfig,
)
from modern_llm.config.errors import UserError
from modern_llm.config.printable import one_line, printable
from modern_llm.demo.corpus import CorpusPaths, write_corpus
from modern_llm.demo.evaluate import StageScore, evaluate_stages
from modern_llm.demo.tokenizer import build_tokenizer
from modern_llm.storage.atomic import write_file
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from modern_llm.training.train_lm import run_training
from modern_llm.training.train_sft import run_sft

log = logging.getLogger(__name__)

RESULT = "demo.json"
MAX_LENGTH = 128


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage, chosen so that the demo takes minutes on two cores."""

    epochs: float
    batch_size: int
    learning_rate: float
    warmup_steps: int
    log_every: int


PRETRAIN = Recipe(epochs=12, batch_size=6, learning_rate=4e-3, warmup_steps=60, log_every=200)
SFT = Recipe(epochs=2, batch_size=32, learning_rate=1e-3, warmup_steps=10, log_every=25)
DPO = Recipe(epochs=2, batch_size=32, learning_rate=1.5e-4, warmup_steps=5, log_every=10)
BETA = 0.1
NAMES = {"pretrain": "pretrained", "sft": "SFT", "dpo": "DPO"}
"""Stage -> its column among the answers."""


def run_demo(output_dir: Path, *, seed: int = 0) -> dict[str, Any]:
    """Run the three stages; print a table, and three questions with the answers of each stage.

    An unfinished demo in `output_dir` resumes; a finished one is repeated.

    Returns:
        `stages` (one object per row of the table), `questions`, `seconds`; also in `demo.json`.

    Raises:
        UserError: `output_dir` contains other files.
    """
    began = time.perf_counter()
    with _own_references(output_dir):
        _clear(output_dir)
        corpus = write_corpus(output_dir / "corpus", seed)
        documents = corpus.documents.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in documents]
        tokenizer = build_tokenizer(output_dir / "tokenizer", texts)
        folders = _train(output_dir, corpus, tokenizer, seed)
        _headline("4 of 4  held-out questions, answered by each stage")
        with _quiet():  # about temporary files that are gone afterwards
            scores, shown = evaluate_stages(folders, corpus, max_length=MAX_LENGTH, beta=BETA)
    seconds = time.perf_counter() - began
    result = {
        "stages": [score.as_dict() for score in scores],
        "questions": shown,
        "seconds": round(seconds, 1),
    }
    write_file(output_dir / RESULT, json.dumps(result, indent=1, ensure_ascii=False))
    _print(scores, shown, seconds, output_dir)
    return result


def _train(output_dir: Path, corpus: CorpusPaths, tokenizer: Path, seed: int) -> dict[str, Path]:
    """Run the three stages; return the final folder of each."""

    def config(stage: str, recipe: Recipe) -> TrainingConfig:
        return TrainingConfig(
            run_name=stage,
            output_dir=output_dir / stage,
            tokenizer_name=str(tokenizer) if stage == "pretrain" else None,
            seed=seed,
            schedule="cosine",
            min_learning_rate_ratio=0.1,
            weight_decay=0.1,
            save_every=500,
            **vars(recipe),
        )

    _headline("1 of 4  pretraining on documents")
    vocabulary = len(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"])
    model = ModernLLMConfig(
        vocab_size=vocabulary,
        d_model=128,
        n_layers=2,
        n_heads=4,
        ffn_hidden_size=352,
        max_seq_len=MAX_LENGTH,
        tie_embeddings=True,
    )
    documents = DocumentDatasetConfig(dataset_name=str(corpus.documents))
    pretrain = run_training(model, config("pretrain", PRETRAIN), documents)
    _headline("2 of 4  supervised fine-tuning: half of the answers terse, half rambling")
    instructions = InstructionDatasetConfig(
        dataset_name=str(corpus.instructions),
        eval_dataset_name=str(corpus.heldout_instructions),
        max_length=MAX_LENGTH,
    )
    sft = run_sft(pretrain, config("sft", SFT), instructions)
    _headline("3 of 4  DPO: terse and right is preferred over rambling or wrong")
    pairs = PreferenceDatasetConfig(
        dataset_name=str(corpus.preferences), eval_dataset_name=str(corpus.heldout_preferences)
    )
    dpo = run_dpo(sft, config("dpo", DPO), DPOConfig(beta=BETA, max_length=MAX_LENGTH), pairs)
    return {"pretrain": pretrain, "sft": sft, "dpo": dpo}


@contextmanager
def _own_references(output_dir: Path) -> Iterator[None]:
    """Store reference values in the demo's folder, unless `MODERN_LLM_CACHE` is set."""
    if "MODERN_LLM_CACHE" in os.environ:
        yield
        return
    os.environ["MODERN_LLM_CACHE"] = str(output_dir / "cache")
    try:
        yield
    finally:
        del os.environ["MODERN_LLM_CACHE"]


def _clear(output_dir: Path) -> None:
    """Remove a finished demo; refuse a folder with other files."""
    ours = {"corpus", "tokenizer", "pretrain", "sft", "dpo", "cache", RESULT}
    foreign = {p.name for p in output_dir.iterdir()} - ours if output_dir.is_dir() else set()
    if foreign:
        raise UserError(
            f"output_dir {output_dir} holds {', '.join(sorted(foreign)[:3])}, which is not part "
            "of a demo; name an empty folder"
        )
    if (output_dir / RESULT).exists():
        for name in ours - {RESULT}:
            shutil.rmtree(output_dir / name, ignore_errors=True)
        (output_dir / RESULT).unlink()


@contextmanager
def _quiet() -> Iterator[None]:
    """Log warnings alone."""
    ours = logging.getLogger("modern_llm")
    level = ours.level
    ours.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        ours.setLevel(level)


def _headline(text: str) -> None:
    log.info("\n== %s", text)


def _print(
    scores: list[StageScore], shown: list[dict[str, str]], seconds: float, output_dir: Path
) -> None:
    """Print the table and the questions on stdout."""
    console = Console()
    table = Table(title=f"Held-out questions ({scores[0].questions})", title_justify="left")
    for name in ("stage", "perplexity", "reward accuracy", "right", "terse", "words per answer"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for score in scores:
        table.add_row(*score.cells())
    console.print()
    console.print(table)
    console.print(
        "perplexity: of held-out instruction answers. reward accuracy: share of held-out pairs in "
        "which the policy, more than the reference (the SFT model), prefers the chosen answer.\n",
        style="dim",
        highlight=False,
    )
    console.print(_answers(shown))
    console.print(f"\n{seconds:.0f} s in all. Models, metrics and data: {output_dir}", markup=False)
    console.print("\nTry next:", style="bold")
    for title, command in next_commands(output_dir).items():
        console.print(f"  {title}:\n    {command}", markup=False, highlight=False, soft_wrap=True)


def _answers(shown: list[dict[str, str]]) -> Table:
    """Return the questions with the answers of the stages side by side."""
    table = Table(
        title="Questions on which the stages differ", title_justify="left", show_lines=True
    )
    for name in ("question (right answer)", *NAMES.values()):
        table.add_column(name, overflow="fold", ratio=1)
    for question in shown:
        asked = one_line(question["prompt"]).removeprefix("Question: ").removesuffix(" Answer:")
        answers = [printable(question[stage].strip()) for stage in NAMES]
        table.add_row(*map(Text, (f"{asked} ({question['right']})", *answers)))
    return table


def next_commands(output_dir: Path) -> dict[str, str]:
    """Return what a user may do next -> a command for it; words in capitals are placeholders."""
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):  # e.g. the environment that launch/setup.sh makes
        python = python.relative_to(Path.cwd())
    program = python.parent / "modern-llm"
    if shutil.which("modern-llm"):
        word = "modern-llm"
    elif program.exists():
        word = shlex.quote(str(program))
    else:
        word = f"{shlex.quote(str(python))} -m modern_llm"
    pairs, model, run = (
        shlex.quote(str(output_dir / part))
        for part in ("corpus/preferences.jsonl", "dpo/dpo_final", "dpo")
    )
    return {
        "your model (a Hub id or a folder) on the demo's pairs": (
            f"{word} dpo --sft_checkpoint MODEL --data {pairs} --train.run_name mine "
            "--train.output_dir experiments/mine"
        ),
        "your data: what is read, dropped and cut": (
            f"{word} inspect --data FILE --tokenizer {model}"
        ),
        "the report of the DPO run, as a page with curves": f"{word} report {run}",
    }
