"""Answers from a model: greedy or drawn, in batches, by `transformers`' own generation.

Called by the verb `generate` and by the demo. The tree attention is for training rows; generation
uses
the model's native one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from modern_llm.config.errors import ConfigError, UserError
from modern_llm.models.load import (
    check_tokenizer_fits,
    inspect_checkpoint,
    load_model,
    load_tokenizer,
)


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts to answer: the one given, those of a file, or the lines of standard
    input."""
    if prompt is not None and file is not None:
        raise ConfigError(["prompt and prompts exclude each other: keep one"])
    if prompt is not None:
        return [prompt]
    try:
        lines = (file.read_text(encoding="utf-8") if file else sys.stdin.read()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts {file}: cannot be read ({error}); check the path and that it is UTF-8"
        ) from error
    if file is None or file.suffix != ".jsonl":
        return [line for line in lines if line]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file}:{number}: not a JSON object with a field prompt ({error})"
            ) from error
        if not isinstance(value, str):
            raise UserError(f"{file}:{number}: prompt is {type(value).__name__}, must be a string")
        prompts.append(value)
    return prompts


def answer_prompts(
    model: str,
    prompts: Sequence[str],
    *,
    template: str | None = None,
    tokenizer_name: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Load a checkpoint and return its answers, one for each prompt.

    Raises:
        UserError: the checkpoint or tokenizer cannot be loaded, or an option has no effect.
    """
    if top_p != 1.0 and temperature == 0:
        raise ConfigError(
            ["top_p has no effect at temperature 0: raise temperature or leave top_p out"]
        )
    checkpoint = inspect_checkpoint(model)
    if tokenizer_name is None and not checkpoint.has_tokenizer:
        raise ConfigError([f"tokenizer_name: {model} holds no tokenizer; name one"])
    tokenizer = load_tokenizer(tokenizer_name or model)
    check_tokenizer_fits(tokenizer, checkpoint.vocabulary, tokenizer_name or model)
    loaded = load_model(checkpoint)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    framed = [_frame(tokenizer, prompt, template) for prompt in prompts]
    return generate(
        loaded,
        tokenizer,
        framed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
    )


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[str]:
    """Return the text that `model` adds to each prompt, up to its end token, without special
    tokens."""
    model.eval()
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_p=top_p if temperature > 0 else None,
        eos_token_id=_end_ids(model, tokenizer),
        pad_token_id=pad if pad is not None else 0,
    )
    answers: list[str] = [""] * len(prompts)
    # Prompts of similar length together: padding on the left costs time.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = [_prompt_ids(tokenizer, prompts[i]) for i in part]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), settings.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        device = model.device
        output = model.generate(
            ids.to(device), attention_mask=mask.to(device), generation_config=settings
        )
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(part, texts, strict=True):
            answers[i] = text
    return answers


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt as training sees them: the tokenizer's own first token, and no end token."""
    ids = tokenizer(prompt)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    # Generation needs something to go on from.
    return ids or [
        tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ]


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return sorted(i for i in ids if i is not None)


def _frame(tokenizer: PreTrainedTokenizerBase, prompt: str, template: str | None) -> str:
    """Write a prompt as training did with the same `template`."""
    if template is None:
        return prompt
    if template == "chat":
        if not tokenizer.chat_template:
            raise ConfigError(
                ["template chat: this tokenizer has no chat template; give a text with {prompt}"]
            )
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    if "{prompt}" not in template:
        raise ConfigError([f"template {template!r}: must be chat or hold {{prompt}}"])
    before, _, after = template.partition("{prompt}")
    return before + prompt + after
