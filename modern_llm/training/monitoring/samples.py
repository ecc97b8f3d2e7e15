"""Answers to fixed prompts during a run, written to `samples.jsonl` beside those before step 1.

Before step 1 the policy has the reference's weights, so these first answers are the reference's.
All processes generate together, because sharded weights are whole only inside a forward of all
ranks. Decoding is greedy, so that a difference comes from training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.data.table.build import Prepared
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.consensus import Rounds
from modern_llm.inference.chat import prompt_ids
from modern_llm.inference.generate import generate_ids, native_attention
from modern_llm.storage.atomic import write_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.untrusted import LARGEST_SAMPLES, json_lines, whole_number
from modern_llm.training.run.folder import RunFolder

PROMPTS = 3
DOCUMENT_START = 16
"""Tokens of a document that are used as a prompt in pretraining."""


class Sampler:
    """Generates the answers of one step and returns their mean lengths.

    Args:
        rows: token ids of each prompt.
        ends: ids that end an answer.
    """

    def __init__(
        self,
        runtime: Runtime,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
        run: RunFolder,
        rows: Sequence[Sequence[int]],
        ends: Sequence[int | None],
    ):
        self._runtime, self._model, self._tokenizer = runtime, model, tokenizer
        self._config, self._rows, self._ends = config, rows, ends
        self.path = run.path / "samples.jsonl"
        self._before: dict[int, dict[str, Any]] = {}
        self._check = run.lock.check

    def start(self, step: int) -> None:
        """Answer before the first step; on resume, read those answers from the file."""
        if self._runtime.is_main:
            kept = [sample for sample in _read(self.path) if sample["step"] <= step]
            self._before = {s["number"]: s for s in kept if s["step"] == 0} if step else {}
            text = "".join(f"{json.dumps(sample)}\n" for sample in kept if step)
            self._check()
            write_file(self.path, text)
        if step == 0:
            self(0)

    def __call__(self, step: int) -> dict[str, float]:
        """Answer every prompt; return the mean lengths in tokens.

        Raises:
            Stopped: a signal asked to stop; these answers are discarded.
        """
        training = self._model.training
        rounds = Rounds(self._runtime, "while it answered prompts")
        with self._runtime.accelerator.autocast(), native_attention(self._model):
            answers = generate_ids(
                self._model,
                self._tokenizer,
                self._rows,
                max_new_tokens=self._config.generate_tokens,
                ends=self._ends,
                check=rounds.check,
            )
        rounds.finish()
        self._model.train(training)
        if not self._runtime.is_main:
            return {}
        samples = [self._sample(step, n, answer) for n, answer in enumerate(answers)]
        self._check()
        with around("samples.append"), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{json.dumps(sample)}\n" for sample in samples))
        if step == 0:
            self._before = dict(enumerate(samples))
        lengths = {"samples/policy_tokens": _mean([s["policy_tokens"] for s in samples])}
        if len(self._before) == len(samples):
            before = [sample["policy_tokens"] for sample in self._before.values()]
            lengths["samples/reference_tokens"] = _mean(before)
        return lengths

    def _sample(self, step: int, number: int, answer: list[int]) -> dict[str, Any]:
        before = self._before.get(number, {})
        decode = self._tokenizer.decode
        return {
            "step": step,
            "number": number,
            "prompt": decode(list(self._rows[number])),
            "policy": decode(answer, skip_special_tokens=True),
            "policy_tokens": len(answer),
            "reference": before.get("policy"),
            "reference_tokens": before.get("policy_tokens"),
        }


def prompt_rows(prepared: Prepared) -> list[list[int]]:
    """Return the prompts of the first held-out examples, or of training examples if there are
    none."""
    table = prepared.evaluation if prepared.evaluation is not None else prepared.train
    column = "prompt" if "prompt" in table.columns else "text"
    rows = []
    for index in range(min(len(table), 64)):
        row = table.ids(index, column).tolist()
        row = row if column == "prompt" else row[:DOCUMENT_START]
        if row and row not in rows:
            rows.append(row)
        if len(rows) == PROMPTS:
            break
    return rows


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the intact samples on disk; a kill may have left the last line incomplete."""
    try:
        values = [value for _, value in json_lines(path, LARGEST_SAMPLES, follow=False)]
    except OSError:
        return []
    return [value for value in values if _is_sample(value)]


def _is_sample(value: Any) -> bool:
    return isinstance(value, dict) and all(
        whole_number(value.get(name)) is not None for name in ("step", "number", "policy_tokens")
    )


def _mean(values: Sequence[int]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else 0.0


def make_sampler(
    runtime: Runtime,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainingConfig,
    run: RunFolder,
    rows: Sequence[Sequence[int]],
    ends: Sequence[int | None],
) -> Sampler | None:
    """Return what answers the fixed prompts of a run; None without `generate_every` or prompts.

    Args:
        rows: token ids of the prompts, unless the configuration has its own.
        ends: ids that end an answer.
    """
    if config.generate_every is None:
        return None
    if config.generate_prompts is not None:
        template = run.record.get("data", {}).get("template")
        rows, _ = prompt_ids(tokenizer, config.generate_prompts, template)
    return Sampler(runtime, model, tokenizer, config, run, rows, ends) if rows else None
