"""Answers from a model: greedy or drawn, in batches, by `transformers`' own generation.

Called by `training.answer`. The tree attention is for training rows; generation
uses
the model's native one.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from modern_llm.config.errors import ConfigError, UserError
from modern_llm.models.attention.prefix_tree import TREE_ATTENTION
from modern_llm.models.load import check_id
from modern_llm.storage.regular_files import read_text

log = logging.getLogger(__name__)

# Tokens for which padding is tried, and the largest difference of a log-prob that rounding makes,
# with float32 and with 16 bits.
TRIED = 4
NEAR, NEAR_16_BITS = 5e-3, 0.5


def read_prompts(prompt: str | None, file: Path | None) -> list[str | list[dict[str, Any]]]:
    """Return the prompts to answer: the one given, those of a file, or the lines of standard
    input."""
    if prompt is not None and file is not None:
        raise ConfigError(["prompt and prompts exclude each other: keep one"])
    if prompt is not None:
        return [prompt]
    try:
        lines = (read_text(file) if file else sys.stdin.read()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts {file}: cannot be read ({error}); check the path and that it is UTF-8"
        ) from error
    if file is None or file.suffix != ".jsonl":
        return [line for line in lines if line]
    return [_prompt(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line]


def _prompt(place: str, line: str) -> str | list[dict[str, Any]]:
    """The prompt of one JSON object: a string, or messages with a role and words each."""
    try:
        values = json.loads(line)
        value = values["messages"] if "messages" in values else values["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}: not a JSON object with a field prompt ({error})") from error
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: prompt is {type(value).__name__}, must be a string or messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{place}: a message has no role; write {{role: ..., content: ...}}")
    return value


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    ends: Iterable[int | None] = (),
    check: Callable[[], None] | None = None,
) -> list[str]:
    """Return the text that `model` adds to each prompt, up to an end token, without special tokens.

    Args:
        prompts: token ids of each prompt, at least one.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn from the whole
            distribution (or its `top_p`), whatever the checkpoint's own generation settings say.
        ends: ids that end an answer besides the model's and the tokenizer's.
        check: called after every token; what it raises ends the generation.
    """
    answers = generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        ends=ends,
        check=check,
    )
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@torch.no_grad()
def generate_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    ends: Iterable[int | None] = (),
    streamer: Any = None,
    check: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Return the ids that `model` adds to each prompt, as `generate` does, its end token left out.

    Args:
        streamer: one of `transformers`' streamers, for a single prompt.
    """
    model.eval()
    torch.manual_seed(seed)
    pad = _padding(model, tokenizer, prompts)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        repetition_penalty=1.0,
        eos_token_id=end_ids(model, (tokenizer.eos_token_id, *ends)),
        pad_token_id=pad,
    )
    answers: list[list[int]] = [[]] * len(prompts)
    last = {*settings.eos_token_id, settings.pad_token_id}
    for part in _batches(model, prompts, settings, batch_size):
        rows = [prompts[i] for i in part]
        width = max(map(len, rows))
        ids, mask = _padded(rows, settings.pad_token_id)
        device = model.device
        output = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            generation_config=settings,
            streamer=streamer,
            stopping_criteria=None if check is None else StoppingCriteriaList([_Checked(check)]),
        )
        for i, row in zip(part, output[:, width:].tolist(), strict=True):
            while row and row[-1] in last:
                row.pop()
            answers[i] = row
    return answers


def _padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> int:
    """Return the id to fill rows with; refuse prompts with ids that the model has no row for."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    for number, row in enumerate(prompts, 1):
        check_id(max(row), vocabulary, tokenizer, f"prompt {number}")
    # A padding token may have been added beside the embedding. Padding is masked: any id will do.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(at for at in known if at is not None and at < vocabulary)


def _batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    batch_size: int,
) -> Iterator[list[int]]:
    """Yield the prompts that are answered together: those of similar length, as padding on the
    left costs time; of equal length where padding would change the answers."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if batch_size > 1 and not _as_alone(model, prompts, order, settings):
        groups = [list(g) for _, g in groupby(order, key=lambda i: len(prompts[i]))]
        crowd = max(groups, key=len)
        alone = len(crowd) == len(order) or not _as_alone(model, prompts, crowd, settings)
        groups = [[i] for i in order] if alone else groups
        log.info(
            "%s: a prompt gets another answer beside %s: answered %s",
            type(model).__name__,
            "others" if alone else "prompts of other lengths",
            "one by one" if alone else "with those of its length",
        )
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask (R, L) of prompts padded on the left."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, width - len(tokens) :] = torch.tensor(list(tokens))
        mask[row, width - len(tokens) :] = 1
    return ids, mask


def _as_alone(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    group: Sequence[int],
    settings: GenerationConfig,
) -> bool:
    """Whether the first of a group, sorted by length, gets the logits beside the last that it gets
    alone, for a few tokens. States, convolutions and positions may run through the padding."""
    if len(group) < 2:
        return True
    rows = [prompts[group[0]], prompts[group[-1]]]
    few = copy.deepcopy(settings)
    few.update(
        max_new_tokens=min(TRIED, settings.max_new_tokens), do_sample=False, temperature=None,
        top_p=None, top_k=None, eos_token_id=None, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    found = []
    for part in (rows[:1], rows):
        ids, mask = (tensor.to(model.device) for tensor in _padded(part, settings.pad_token_id))
        try:
            output = model.generate(ids, attention_mask=mask, generation_config=few)
        except Exception as error:  # foreign code
            log.debug("%s with padding: %s", type(model).__name__, error)
            return False
        logits = torch.stack([step[0].float() for step in output.logits])
        found.append((output.sequences[0, ids.shape[1] :], logits.log_softmax(-1)))
    (alone, expected), (beside, logprobs) = found
    worst = 0.0
    for at in range(len(alone)):
        worst = max(worst, float((logprobs[at] - expected[at]).abs().max()))
        if alone[at] != beside[at]:
            break
    narrow = model.dtype != torch.float32 or torch.is_autocast_enabled(model.device.type)
    return worst <= (NEAR_16_BITS if narrow else NEAR)


class _Checked(StoppingCriteria):
    """Stops nothing by itself; asks after each token whether an error should."""

    def __init__(self, check: Callable[[], None]):
        self._check = check

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._check()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def native_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give a model that is being trained on trees its own attention back while it generates."""
    if model.config._attn_implementation != TREE_ATTENTION:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(TREE_ATTENTION)


def end_ids(model: PreTrainedModel, more: Iterable[int | None]) -> list[int]:
    """Return the ids at which the model's own generation settings end an answer, and `more`."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), *more} - {None})
