"""From a prompt to the one text that is tokenised: literal, framed, or through a chat template.

Strings are used as they are unless the user gives a template; message lists always go through a
chat template: the user's, the tokenizer's or, for a tokenizer without one,
`FALLBACK_CHAT_TEMPLATE`, which the report then names. Called by `prepare`; a stage that exports a
tokenizer can ask `chat_template_of` for the template that was used.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Protocol

from modern_llm.config.errors import DataError
from modern_llm.data.records import Message, Prompt, RowFault

# Zephyr's turns in plain words: no token that a base model lacks, no space before the answer.
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


class Tokenizer(Protocol):
    """What is used of a `transformers` tokenizer, so that this package part does not import it."""

    is_fast: bool
    eos_token_id: int | None
    eos_token: str | None
    chat_template: Any
    all_special_ids: list[int]
    split_special_tokens: bool
    added_tokens_decoder: dict[int, Any]
    backend_tokenizer: Any

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Return an encoding with `input_ids`."""

    def apply_chat_template(self, conversation: list[Message], **options: Any) -> Any:
        """Return the text of a conversation."""

    def decode(self, token_ids: list[int], **options: Any) -> str:
        """Return the text of ids."""

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id."""


class Template:
    """How prompts become text.

    Args:
        tokenizer: gives the chat template where `template` does not.
        template: as in `PreferenceDatasetConfig.template`.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        self._tokenizer = tokenizer
        self.frame = template if template is not None and _is_frame(template) else None
        self.wraps = template is not None and self.frame is None
        self.chat = chat_template_of(tokenizer, template)

    @property
    def fell_back(self) -> bool:
        """Whether message lists are written by `FALLBACK_CHAT_TEMPLATE`."""
        return self.chat == FALLBACK_CHAT_TEMPLATE

    def describe(self) -> str:
        """Return in a few words how prompts are written, with a digest of the template."""
        if self.frame is not None:
            return f"strings in a frame ({_digest(self.frame)})"
        whose = "given" if self.chat else "the tokenizer's own"
        if self.fell_back:
            whose = "the fallback for tokenizers without one"
        text = self.chat or self._tokenizer.chat_template
        strings = "as user turns" if self.wraps else "literally"
        return f"strings {strings}; messages by the chat template {_digest(text)} ({whose})"

    def render(self, prompt: Prompt) -> tuple[str, bool]:
        """Return the text of a prompt, and whether a chat template wrote it.

        Raises:
            RowFault: the chat template refuses the messages.
            DataError: a `{prompt}` frame was given for message lists.
        """
        if isinstance(prompt, str):
            if self.frame is not None:
                # Not str.format: other braces of the frame are text.
                before, _, after = self.frame.partition("{prompt}")
                return before + prompt + after, False
            if not self.wraps:
                return prompt, False
            prompt = [{"role": "user", "content": prompt}]
        elif self.frame is not None:
            raise DataError(
                f"template {self.frame!r} frames strings, and the prompts here are message "
                "lists: leave it out, or give a Jinja chat template"
            )
        return self.turns(prompt, open_answer=True), True

    def turns(self, messages: list[Message], *, open_answer: bool) -> str:
        """Return the text of messages; `open_answer` adds the head of the assistant's next turn."""
        tools = list(getattr(messages, "tools", ()))
        written = str(self.chat or self._tokenizer.chat_template)
        calls = any(message.get("tool_calls") for message in messages)
        for name, there in (("tools", bool(tools)), ("tool_calls", calls)):
            if there and name not in written:
                raise RowFault(
                    f"the row has {name} and the chat template does not write them: "
                    "give a template that does, or leave them out"
                )
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self.chat,
                tokenize=False,
                add_generation_prompt=open_answer,
            )
        except Exception as error:  # a template may raise what it likes
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RowFault(f"the chat template refuses the messages: {reason}") from error


def chat_template_of(tokenizer: Tokenizer, template: str | None) -> str | None:
    """Return the user's chat template, None for the tokenizer's own, or the fallback."""
    if template is not None and "{%" in template:
        return template
    return None if tokenizer.chat_template else FALLBACK_CHAT_TEMPLATE


def _digest(template: Any) -> str:
    """Twelve hexadecimal digits; a tokenizer may have several templates by name."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_frame(template: str) -> bool:
    return template != "chat" and "{%" not in template


def end_tokens(tokenizer: Tokenizer, template: Template) -> tuple[int | None, int | None]:
    """Return the ids that end an answer: after a plain prompt, and after one of a chat template.

    The second is the first special token that the template writes after an assistant's words: some
    models end a turn with another token than a document (`<end_of_turn>`, not `<eos>`).
    """
    plain = tokenizer.eos_token_id
    mark = "ANSWER"
    talk = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": mark}]
    try:
        text = template.turns(talk, open_answer=False)
    except RowFault:
        return plain, plain
    _, found, tail = text.rpartition(mark)
    if not found:
        return plain, plain
    special = {*tokenizer.all_special_ids}
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    return plain, next((i for i in ids if i in special), plain)
