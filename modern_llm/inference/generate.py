"""Text generation in batches, greedy or sampled, with the `generate` method of `transformers`."""

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

# Tokens of the test whether padding changes answers, and the largest difference of a log-prob that
# is rounding: in float32 and in 16 bits.
TRIED = 4
NEAR, NEAR_16_BITS = 5e-3, 0.5


def read_prompts(prompt: str | None, file: Path | None) -> list[str | list[dict[str, Any]]]:
    """Return the given prompt, the prompts of a file, or the lines of standard input."""
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
    if not any(lines):
        place = f"prompts {file}" if file else "standard input"
        raise UserError(f"{place}: holds no prompt; give one a line, or --prompt TEXT")
    if file is None or file.suffix != ".jsonl":
        return [line for line in lines if line]
    return [_prompt(f"{file}:{number}", line) for number, line in enumerate(lines, 1) if line]


def _prompt(place: str, line: str) -> str | list[dict[str, Any]]:
    """Return the prompt of one JSON line: a string, or messages with role and content."""
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
        temperature: 0 is greedy. Above, tokens are sampled from the whole distribution or its
            `top_p`; the checkpoint's own generation settings are ignored.
        ends: ids that end an answer besides the model's and the tokenizer's.
        check: called after every token; it may raise to end the generation.
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
    """Return the ids that `model` adds to each prompt, without the end token; see `generate`.

    Args:
        streamer: a streamer of `transformers`, for a single prompt.
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
    criteria = None if check is None else StoppingCriteriaList([_CheckEachToken(check)])
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
            stopping_criteria=criteria,
        )
        for i, row in zip(part, output[:, width:].tolist(), strict=True):
            while row and row[-1] in last:
                row.pop()
            answers[i] = row
    return answers


def _padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> int:
    """Return the padding id; refuse prompts with ids outside the model's vocabulary."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    for number, row in enumerate(prompts, 1):
        check_id(max(row), vocabulary, tokenizer, f"prompt {number}")
    # The padding token may be outside the embedding. Padding is masked, so any id works.
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(at for at in known if at is not None and at < vocabulary)


def _batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    batch_size: int,
) -> Iterator[list[int]]:
    """Yield indices of prompts to answer together: of similar length, because padding costs time;
    of equal length or alone if padding or other rows change the answers."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if batch_size > 1 and not _batch_matches_alone(model, prompts, order, settings):
        groups = [list(g) for _, g in groupby(order, key=lambda i: len(prompts[i]))]
        largest = max(groups, key=len)
        alone = len(largest) == len(order)
        alone = alone or not _batch_matches_alone(model, prompts, largest, settings)
        groups = [[i] for i in order] if alone else groups
        log.info(
            "%s: answers change in a batch with %s: prompts are answered %s",
            type(model).__name__,
            "other prompts" if alone else "prompts of other lengths",
            "one by one" if alone else "with those of equal length",
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


def _batch_matches_alone(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    group: Sequence[int],
    settings: GenerationConfig,
) -> bool:
    """Whether the shortest prompt gets the same logits alone and in a batch with the longest.

    Recurrent states, convolutions and positions may depend on the padding. `group` is sorted by
    length; a few tokens are compared.
    """
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
        except Exception as error:  # the model's code may raise anything
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


class _CheckEachToken(StoppingCriteria):
    """Calls `check` after each token, which may raise; never stops by itself."""

    def __init__(self, check: Callable[[], None]):
        self._check = check

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._check()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


@contextmanager
def native_attention(model: PreTrainedModel) -> Iterator[None]:
    """Generate with the model's own attention if tree attention is set for training."""
    if model.config._attn_implementation != TREE_ATTENTION:
        yield
        return
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(TREE_ATTENTION)


def end_ids(model: PreTrainedModel, more: Iterable[int | None]) -> list[int]:
    """Return the ids that end an answer by the model's generation settings, and `more`."""
    own = model.generation_config.eos_token_id
    return sorted({*(own if isinstance(own, list) else [own]), *more} - {None})
