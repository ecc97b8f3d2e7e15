"""The demo's tokenizer: byte-level BPE learnt from the corpus, as a `transformers` folder.

Byte-level, so that any text round-trips exactly. Small, so that the embedding is a fraction of a
model with a million parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modern_llm.storage.atomic import committed_folder
from modern_llm.storage.fault_points import around

END_TOKEN = "<|end|>"
PAD_TOKEN = "<|pad|>"
VOCAB_SIZE = 1024


def build_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Path:
    """Learn at most `vocab_size` tokens from `texts`, write them to `folder`, and return `folder`.

    Ids: 0 `END_TOKEN`, 1 `PAD_TOKEN`, then the 256 bytes, then merges, fewer for little text.
    Encoding adds no special token. ValueError if `vocab_size` is too small for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [END_TOKEN, PAD_TOKEN]
    if vocab_size < len(alphabet) + len(specials):
        raise ValueError(
            f"vocab_size must hold the {len(alphabet)} bytes and {len(specials)} special tokens, "
            f"got {vocab_size}: use at least {len(alphabet) + len(specials)}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        # The default would delete spaces before punctuation when decoding.
        clean_up_tokenization_spaces=False,
    )
    with committed_folder(folder) as temporary, around("tokenizer.write"):
        wrapped.save_pretrained(str(temporary))
    return folder
