"""Tokenizers of both kinds with chat templates, and the ids that training gets of rows."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers as tokenizer_trainers
from transformers import PreTrainedTokenizerFast

from modern_llm.config import InstructionDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.encode.pipeline import Recipe, answers_recipe
from modern_llm.data.read.readers import Row
from modern_llm.data.table.iterate import RecordReader
from tests.helpers.chat_templates import PLAIN_TOKENS, TOKENS

CORPUS = [
    "\n\nHuman: How far is the moon?\n\nAssistant: About 384,400 kilometres, on average.",
    "The harbour was quiet in the morning. Boats came in one after another, two and three.",
    "To bake bread, mix flour, water, salt and yeast; wait; then bake it for forty minutes.",
    "<think>\n\n</think>\n\n Five.\n\nWhat is two plus three? [INST] Hi [/INST] 5. \n\n \n",
]


def byte_level(*, begin: bool = False, chat: str | None = None) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama-3 and Qwen: a text has the same tokens at every position."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return _finished(core, begin, chat)


def sentence_piece(
    *, begin: bool = True, chat: str | None = None, legacy: bool = True
) -> PreTrainedTokenizerFast:
    """As Llama-2 and Mistral: a word mark is put before every separate text (`legacy`: and after
    every special token)."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    trainer = tokenizer_trainers.BpeTrainer(
        vocab_size=460, special_tokens=["<unk>", *bytes_], show_progress=False, max_token_length=10
    )
    core.train_from_iterator((text.replace("\n", " ") for text in CORPUS), trainer)
    return _finished(core, begin, chat, unk_token="<unk>")


def _finished(
    core: Tokenizer, begin: bool, chat: str | None, **names: str
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", bos_token="<s>" if begin else None, **names
    )
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.add_tokens(PLAIN_TOKENS)
    if begin:
        token = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[token]
        )
    tokenizer.chat_template = chat
    return tokenizer


def recipe_of(
    tokenizer: Any, kind: str, *, max_length: int = 4096, prompt: int | None = None, **section: Any
) -> Recipe:
    """The recipe of `pairs` or `answers`."""
    pairs = kind == "pairs"
    schema = PreferenceDatasetConfig if pairs else InstructionDatasetConfig
    config = schema(dataset_name="x.jsonl", **section)
    return answers_recipe(config, tokenizer, max_length=max_length, max_prompt_length=prompt)


def trained_ids(recipe: Recipe, row: dict[str, Any]) -> list[list[int]]:
    """The ids of a row as they would be trained on: prompt, then the answers."""
    read = RecordReader(recipe.formats, recipe.name, recipe.mode)
    item = recipe.item(read(Row(row, "x:1")))
    parts = recipe.split(item, recipe.encoder(item.texts))
    return [ids.tolist() for ids in recipe.cells(parts)]
