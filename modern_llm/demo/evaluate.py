"""Scores of the demo's stages on held-out questions, pairs and answers.

Answers are generated at temperature 1, to show the mixture of styles that a model has learnt; a
greedy answer would show only one style.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modern_llm.config import InstructionDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.order import Budget, pack
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.table.build import prepare_tables
from modern_llm.demo.corpus import CorpusPaths, read_questions
from modern_llm.demo.judge import Verdict, judge, word_count
from modern_llm.evaluation.score import score_pairs
from modern_llm.inference.chat import prompt_ids
from modern_llm.inference.generate import generate
from modern_llm.models.load import inspect_checkpoint, load_model, load_tokenizer, make_scorer
from modern_llm.setup.micro_batches import sharing

TEMPERATURE = 1.0
SHOWN = 3


@dataclass(frozen=True)
class StageScore:
    """One row of the table."""

    stage: str
    questions: int
    perplexity: float
    reward_accuracy: float | None
    right: float
    terse: float
    words: float

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)

    def cells(self) -> list[str]:
        """Return the row as text."""
        reward = "(reference)" if self.reward_accuracy is None else f"{self.reward_accuracy:.1%}"
        shares = [f"{self.right:.1%}", f"{self.terse:.1%}", f"{self.words:.1f}"]
        return [self.stage, f"{self.perplexity:.2f}", reward, *shares]


def evaluate_stages(
    folders: dict[str, Path], corpus: CorpusPaths, *, max_length: int, beta: float
) -> tuple[list[StageScore], list[dict[str, str]]]:
    """Return one score per stage, and some questions on which the stages differ with the answer
    of each.

    Args:
        folders: stage -> final model; `sft` is the reference of the reward.
    """
    questions = read_questions(corpus.questions)
    answers: dict[str, list[str]] = {}
    judged: dict[str, list[Verdict]] = {}
    scores = []
    for stage, folder in folders.items():
        model = load_model(inspect_checkpoint(folder))
        tokenizer = load_tokenizer(folder)
        rows, ends = prompt_ids(tokenizer, [question.prompt for question in questions], None)
        replies = generate(
            model,
            tokenizer,
            rows,
            max_new_tokens=48,
            temperature=TEMPERATURE,
            batch_size=128,
            ends=ends,
        )
        verdicts = [judge(q, reply) for q, reply in zip(questions, replies, strict=True)]
        answers[stage], judged[stage] = replies, verdicts
        scores.append(
            StageScore(
                stage=stage,
                questions=len(questions),
                perplexity=_perplexity(folder, corpus.heldout_instructions, max_length),
                reward_accuracy=None
                if stage == "sft"
                else _reward_accuracy(folder, folders["sft"], corpus, max_length, beta),
                right=float(np.mean([v.right for v in verdicts])),
                terse=float(np.mean([v.terse for v in verdicts])),
                words=float(np.mean([word_count(reply) for reply in replies])),
            )
        )
    shown = [
        {"prompt": questions[at].prompt, "right": questions[at].answer}
        | {stage: replies[at] for stage, replies in answers.items()}
        for at in typical_differences(list(zip(*judged.values(), strict=True)), SHOWN)
    ]
    return scores, shown


def typical_differences(verdicts: Sequence[tuple[Verdict, ...]], count: int) -> list[int]:
    """Return questions that show how the stages differ, one for each of the most common ways.

    Args:
        verdicts: of each question, one verdict per stage, the last stage last.

    Returns:
        Indices of at most `count` questions that the last stage answers right and tersely, and
        others do not. One of them has a wrong answer of an earlier stage, if any has. Fewer
        differences than `count` are filled up with further questions.
    """
    good = Verdict(right=True, terse=True)
    ways: dict[tuple[Verdict, ...], list[int]] = {}
    for at, verdict in enumerate(verdicts):
        if verdict[-1] == good and set(verdict) != {good}:
            ways.setdefault(verdict, []).append(at)
    common = sorted(ways, key=lambda way: -len(ways[way]))
    wrong = [way for way in common if not all(verdict.right for verdict in way)][:1]
    chosen = [way for way in common if way not in wrong][: count - len(wrong)] + wrong
    found = [ways[way][0] for way in chosen]
    rest = [at for way in common for at in ways[way]] + list(range(len(verdicts)))
    return list(dict.fromkeys(found + rest))[:count]


@torch.inference_mode()
def _perplexity(folder: Path, instructions: Path, max_length: int) -> float:
    """Return the perplexity of the held-out answers."""
    scorer = make_scorer(load_model(inspect_checkpoint(folder))).eval()
    with tempfile.TemporaryDirectory(prefix="modern-llm-demo-") as temporary:
        config = InstructionDatasetConfig(dataset_name=str(instructions), max_length=max_length)
        table = prepare_tables(
            config, load_tokenizer(folder), Path(temporary) / "data", max_length=max_length
        ).train
        examples = Examples(table, trees=scorer.capabilities.trees)
        groups = pack(
            np.arange(len(table)),
            examples.sizes,
            world=1,
            budget=Budget(tokens=2048),
            shared=sharing(scorer),
        )[0]
        nll = tokens = 0.0
        for group in groups:
            batch = collate(examples, group, shared=sharing(scorer))
            output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
            nll -= float(output.logprobs.double().sum())
            tokens += float(batch.lengths.sum())
    return math.exp(nll / tokens)


def _reward_accuracy(
    policy: Path, reference: Path, corpus: CorpusPaths, max_length: int, beta: float
) -> float:
    """Return the share of held-out pairs whose chosen answer has the strictly higher reward."""
    with tempfile.TemporaryDirectory(prefix="modern-llm-demo-") as temporary:
        output = Path(temporary) / "scores.jsonl"
        data = PreferenceDatasetConfig(dataset_name=str(corpus.heldout_preferences))
        score_pairs(str(policy), data, output, reference=str(reference), max_length=max_length)
        rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    rewards = [
        [
            beta * (row[f"policy_{side}"] - row[f"reference_{side}"])
            for side in ("chosen", "rejected")
        ]
        for row in rows
    ]
    return float(np.mean([chosen > rejected for chosen, rejected in rewards]))
