"""The tokenizer of a run: which one is used, and what ends an answer."""

from __future__ import annotations

import logging

from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.data import DatasetConfig
from modern_llm.config.errors import ConfigError
from modern_llm.data.encode.chat_template import Template, chat_template_of, end_tokens
from modern_llm.data.encode.tokenizer import check_tokenizers_agree
from modern_llm.data.table.build import FELL_BACK, Prepared, holds_ids, sample_texts
from modern_llm.models.load import Checkpoint, load_tokenizer, outside_note

log = logging.getLogger(__name__)


def choose_tokenizer(
    argument: str | None,
    checkpoint: Checkpoint | None,
    config: TrainingConfig,
    data: DatasetConfig | None = None,
) -> tuple[PreTrainedTokenizerBase | None, list[tuple[str, PreTrainedTokenizerBase]]]:
    """Return the tokenizer to use, and the others that were named and must agree with it.

    The argument of `run_*` comes first, then the one in the checkpoint, then
    `train.tokenizer_name`. Rows of token ids need none.

    Args:
        data: what will be read, if it may hold token ids.
    """
    candidates: list[tuple[str, str]] = []
    if argument:
        candidates.append(("the tokenizer_name argument", argument))
    if checkpoint is not None and checkpoint.has_tokenizer:
        candidates.append(("the checkpoint", checkpoint.place))
    if config.tokenizer_name:
        candidates.append(("train.tokenizer_name", config.tokenizer_name))
    if not candidates and data is not None and holds_ids(data):
        if config.generate_every is not None:
            raise ConfigError(["train.generate_every needs a tokenizer: name one, or remove it"])
        log.info("tokenizer: none; the data holds token ids")
        return None, []
    if not candidates:
        raise ConfigError(
            ["train.tokenizer_name: the checkpoint holds no tokenizer and none is named; name one"]
        )
    (origin, place), *others = candidates
    tokenizer = load_tokenizer(place)
    log.info("tokenizer: %s (%s)", place, origin)
    if checkpoint is not None:
        note = outside_note(tokenizer, checkpoint.vocabulary)
        if note is not None:
            log.info("tokenizer: %s", note)
    loaded = [(other, load_tokenizer(other)) for _, other in others if other != place]
    return tokenizer, loaded


def check_agreement(
    tokenizer: PreTrainedTokenizerBase | None,
    others: list[tuple[str, PreTrainedTokenizerBase]],
    data: DatasetConfig,
) -> None:
    """Refuse tokenizers that are named beside the one in use and give other ids on this data."""
    texts = sample_texts(data) if others else []
    for _, other in others:
        assert tokenizer is not None
        check_tokenizers_agree(tokenizer, other, texts)


def answer_ends(
    tokenizer: PreTrainedTokenizerBase | None, data: DatasetConfig, prepared: Prepared
) -> tuple[int | None, ...]:
    """Return the ids that end an answer in this data; the tokenizer gets the chat template in use.

    A template that the user gives, or the fallback for a tokenizer without one, is exported with
    the model: generation must write prompts as training did.
    """
    if tokenizer is None:
        return ()
    template = data.template
    log.info("template: %s", Template(tokenizer, template).describe())
    asked = template is not None and (template == "chat" or "{%" in template)
    if asked or FELL_BACK in prepared.report.notes:
        tokenizer.chat_template = chat_template_of(tokenizer, template) or tokenizer.chat_template
    if not tokenizer.chat_template:
        return (tokenizer.eos_token_id,)
    return end_tokens(tokenizer, Template(tokenizer, template, data.template_date))
