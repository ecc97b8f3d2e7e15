"""Answers to prompts that are written exactly as training wrote them: same template, same ids.

Called by the verb `generate` and by the demo.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from modern_llm.config.data import known_template
from modern_llm.config.errors import ConfigError
from modern_llm.data.templates import Template, end_tokens
from modern_llm.data.tokenize import Encoder
from modern_llm.models.generate import generate
from modern_llm.models.load import (
    check_tokenizer_fits,
    inspect_checkpoint,
    load_model,
    load_tokenizer,
)


def answer_prompts(
    model: str,
    prompts: Sequence[str],
    *,
    template: str | None = None,
    tokenizer_name: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
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
    if seed is not None and temperature == 0:
        raise ConfigError(
            ["seed has no effect at temperature 0: raise temperature or leave it out"]
        )
    try:
        known_template(template)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    checkpoint = inspect_checkpoint(model)
    if tokenizer_name is None and not checkpoint.has_tokenizer:
        raise ConfigError([f"tokenizer_name: {model} holds no tokenizer; name one"])
    tokenizer = load_tokenizer(tokenizer_name or model)
    check_tokenizer_fits(tokenizer, checkpoint.vocabulary, tokenizer_name or model)
    loaded = load_model(checkpoint)
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    rows, ends = prompt_ids(tokenizer, prompts, template)
    return generate(
        loaded,
        tokenizer,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed or 0,
        batch_size=batch_size,
        ends=ends,
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: str | None
) -> tuple[list[list[int]], tuple[int | None, ...]]:
    """Return the ids of each prompt as SFT and DPO see them, and the ids that end an answer.

    Args:
        template: as in the data sections: `chat`, a text with `{prompt}`, a Jinja chat template.
    """
    writer, encoder = Template(tokenizer, template), Encoder(tokenizer)
    written = [writer.render(prompt) for prompt in prompts]
    rows = []
    for ids, (_, chat) in zip(encoder([text for text, _ in written]), written, strict=True):
        # A chat template writes the leading special tokens of its own model.
        rows.append((ids if chat else encoder.with_lead(ids)).tolist())
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    plain, chat_end = end_tokens(tokenizer, writer)
    # Generation needs something to go on from, an empty prompt too.
    return [row or [start] for row in rows], (plain, chat_end)
