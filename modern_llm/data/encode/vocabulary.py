"""Interface of a tokenizer, and the ids of its special tokens."""

from __future__ import annotations

from typing import Any, Protocol

from modern_llm.data.read.records import Message


class Tokenizer(Protocol):
    """The parts of a `transformers` tokenizer in use, declared here to avoid its import."""

    is_fast: bool
    eos_token_id: int | None
    bos_token: str | None
    chat_template: Any
    all_special_ids: list[int]
    split_special_tokens: bool
    added_tokens_decoder: dict[int, Any]
    backend_tokenizer: Any

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Return an encoding with `input_ids`."""

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Return the text of a conversation."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the token of an id, or the tokens of several."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        """Return the text of ids."""

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""


def leading_specials(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that the tokenizer puts before a text (and not those it puts after)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for at in range(len(full) - len(bare) + 1):
        if bare and full[at : at + len(bare)] == bare:
            return full[:at]
    return []


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the special tokens, those that only their entry calls special included."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*tokenizer.all_special_ids, *added})
