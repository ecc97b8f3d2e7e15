"""Texts to tokenise from a record: literal, framed, or rendered by a chat template.

Strings are used as they are unless the user gives a template; message lists always go through a
chat template: the user's, the tokenizer's or, for a tokenizer without one,
`FALLBACK_CHAT_TEMPLATE`, which the report then names. `chat_template_of` returns the template in
use, for stages that export a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from os.path import commonprefix

from modern_llm.config.errors import DataError
from modern_llm.config.printable import first_line
from modern_llm.data.encode.content import ContentForms
from modern_llm.data.encode.message_keys import WrittenKeys, arguments_of, with_text_arguments
from modern_llm.data.encode.rendering import Rendered, render_chat, template_digest
from modern_llm.data.encode.vocabulary import Tokenizer, leading_specials, special_ids
from modern_llm.data.read.records import (
    ContentFault,
    Conversation,
    Instruction,
    Message,
    PreferencePair,
    Prompt,
    Response,
    RowFault,
    answered,
)

# Zephyr's turns in plain words: no token that a base model lacks, no space before the answer.
FALLBACK_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

_MOST_OPENINGS = 10


@dataclass(frozen=True, slots=True)
class Written:
    """Texts of one record, ready to tokenise.

    `head` is the prompt. With `chat` each of `wholes` is the conversation up to the end of its
    answer and begins with `head`; without, it is the text of an answer.
    """

    head: str
    wholes: tuple[str, ...]
    chat: bool


class Template:
    """Converter of prompts and answers to text.

    Args:
        tokenizer: gives the chat template where `template` does not.
        template: as in `PreferenceDatasetConfig.template`.
        day: what a chat template reads as today's date (YYYY-MM-DD); by default today.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, day: str | None = None):
        self._tokenizer = tokenizer
        self._day = date.today() if day is None else date.fromisoformat(day)
        self.frame = template if template is not None and _is_frame(template) else None
        self.wraps = template is not None and self.frame is None
        self.chat = chat_template_of(tokenizer, template)
        self._openings: set[str] = set()
        self.remarks: set[str] = set()
        self._forms = ContentForms(lambda talk: self._apply(talk, open_answer=False))
        self.source = str(self.chat or tokenizer.chat_template)
        self._keys = WrittenKeys(self.source, lambda talk: self.turns(talk, open_answer=False))
        self._end, self._footer = self._probe_footer()

    @property
    def fell_back(self) -> bool:
        """Whether message lists are written by `FALLBACK_CHAT_TEMPLATE`."""
        return self.chat is not None and self.chat.endswith(FALLBACK_CHAT_TEMPLATE)

    def describe(self) -> str:
        """Return in a few words how prompts are written, with a digest of the template."""
        if self.frame is not None:
            return f"strings in a frame ({template_digest(self.frame)})"
        whose = "given" if self.chat else "the tokenizer's own"
        if self.fell_back:
            whose = "the fallback for tokenizers without one"
        text = self.chat or self._tokenizer.chat_template
        strings = "as user turns" if self.wraps else "literally"
        return f"strings {strings}; messages by the chat template {template_digest(text)} ({whose})"

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
        elif self.frame is not None:
            raise DataError(
                f"template {self.frame!r} frames strings, and the prompts here are message "
                "lists: leave it out, or give a Jinja chat template"
            )
        return self.turns(as_messages(prompt), open_answer=True), True

    def compose(self, record: PreferencePair | Instruction) -> Written:
        """Return the texts of a record: what training tokenises.

        The prompt of a conversation is the rendered prompt, as at inference. Where a template does
        not write it at the start of the conversation (it opens a thought and then removes it), the
        longest common part is the prompt.

        Raises:
            RowFault: the chat template refuses the messages, or does not write the turns before the
                answer in the same way when the answer follows, or does not write the answer.
            ContentFault: the answers, or the two prompts of a pair, differ as they should not.
        """
        text, chat = self.render(record.prompt)
        if not chat:
            return Written(text, tuple(map(_words, record.responses)), False)
        other = getattr(record, "rejected_prompt", None)
        if other is not None and self.render(other)[0] != text:
            raise ContentFault("transcripts differ before the last turn")
        prompt = as_messages(record.prompt)
        answers = [_as_answer(response) for response in record.responses]
        wholes = [self.closed(answered(prompt, answer)) for answer in answers]
        head = self.head(text, wholes, prompt)
        if any(not whole[len(head) :].strip() for whole in wholes):
            raise RowFault("the chat template writes nothing for the answer")
        if len(wholes) > 1 and wholes[0] == wholes[1]:
            raise ContentFault(f"equal responses{self._unwritten(*answers)}")
        return Written(head, tuple(wholes), True)

    def closed(self, messages: list[Message], *, noted: bool = True) -> str:
        """Return the conversation without the text after the template's end marker.

        Args:
            noted: whether keys of the messages that are not written are reported.
        """
        text = self.turns(messages, open_answer=False)
        if noted:
            self._keys.see(messages, text)
        ended = self._footer and text.endswith(self._end + self._footer)
        return text[: -len(self._footer)] if ended else text

    def head(self, text: str, wholes: Sequence[str], prompt: list[Message]) -> str:
        """Return the part of the rendered prompt that starts every conversation."""
        if all(whole.startswith(text) for whole in wholes):
            return text
        head = commonprefix([text, *wholes])
        closed = self.turns(prompt, open_answer=False).rstrip()
        words = prompt[-1].get("content")
        words = words.strip() if isinstance(words, str) else ""
        at = text.rfind(words, 0, len(closed)) if words else -1
        last = at + len(words) if at >= 0 else len(closed)
        if not head.startswith(closed) and len(head) < last:
            at = len(head)
            raise RowFault(
                "the chat template writes the turns before the answer in another way when the "
                f"answer follows (from character {at + 1} on {text[at : at + 20]!r} and "
                f"{wholes[0][at : at + 20]!r}), so that no prompt can be told from the answer: "
                "give another template"
            )
        opened = text[len(head) :]
        if opened.strip() and len(self._openings) < _MOST_OPENINGS:
            self._openings.add(opened[:40])
        return head

    def _unwritten(self, first: Message, second: Message) -> str:
        """Return the reason why two different answers have one text, for a message."""
        keys = sorted(k for k in first.keys() | second.keys() if first.get(k) != second.get(k))
        keys = [key for key in keys if key != "content"]
        return (
            f" (the chat template does not write {', '.join(map(repr, keys[:3]))})" if keys else ""
        )

    def turns(self, messages: list[Message], *, open_answer: bool) -> Rendered:
        """Return the text of messages; `open_answer` adds the head of the assistant's next turn."""
        self._refuse_tools(messages)
        tools = list(getattr(messages, "tools", ()))
        messages = Conversation.of([self._forms.fit(message) for message in messages], tools)
        try:
            text = self._apply(messages, open_answer)
            # A template that joins the arguments of a call to its text wants them as text.
            if not any(str(arguments) in text for arguments in arguments_of(messages)):
                return text
        except DataError:
            raise
        except Exception as error:  # a template may raise what it likes
            if not arguments_of(messages):
                raise _refusal(error) from error
        try:
            return self._apply(with_text_arguments(messages), open_answer)
        except DataError:
            raise
        except Exception as error:
            raise _refusal(error) from error

    def _apply(self, messages: list[Message], open_answer: bool) -> Rendered:
        return render_chat(
            self._tokenizer,
            list(messages),
            template=self.chat,
            tools=list(getattr(messages, "tools", ())),
            add_generation_prompt=open_answer,
            day=self._day,
        )

    def _refuse_tools(self, messages: list[Message]) -> None:
        """Refuse tools and calls that the template does not write."""
        calls = any(message.get("tool_calls") for message in messages)
        for name, there in (("tools", bool(getattr(messages, "tools", ()))), ("tool_calls", calls)):
            if there and not self._keys.mentions(name):
                raise RowFault(
                    f"the row has {name} and the chat template does not write them: "
                    "give a template that does, or leave them out"
                )

    def _probe_footer(self) -> tuple[str, str]:
        """The end marker of a last answer, and the text that the template writes after it."""
        tail, end = _tail_and_end(self._tokenizer, self, _ANSWER)
        if end is None:
            return "", ""
        mark = self._tokenizer.convert_ids_to_tokens(end)
        return mark, tail.partition(mark)[2]

    def take_remarks(self) -> list[str]:
        """Return remarks for the user about the rows rendered since the last call, one per line."""
        lines = []
        if keys := self._keys.take_unwritten():
            names = ", ".join(map(repr, keys[:20])) + (", ..." if len(keys) > 20 else "")
            lines.append(f"keys of messages that the chat template does not write: {names}")
        lines += [
            f"the chat template opens an answer with {opened!r} and does not write that where the "
            "answer follows: such rows are trained without it"
            for opened in sorted(self._openings)
        ]
        lines += sorted(self.remarks)
        self._openings.clear()
        self.remarks.clear()
        return lines


def as_messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _as_answer(response: Response) -> Message:
    if isinstance(response, str):
        return {"role": "assistant", "content": response}
    return response


def _words(response: Response) -> str:
    assert isinstance(response, str), "messages are answered by messages"
    return response


def _refusal(error: Exception) -> RowFault:
    return RowFault(f"the chat template refuses the messages: {first_line(error)}")


def chat_template_of(tokenizer: Tokenizer, template: str | None) -> str | None:
    """Return the user's chat template, None for the tokenizer's own, or the fallback.

    A template that is not the model's own begins with the leading special tokens of the tokenizer
    (a BOS), unless it writes them itself: the model saw them at the start of every text.
    """
    own = tokenizer.chat_template
    if template is not None and "{%" in template:
        return None if template == own else _with_lead(tokenizer, template)
    return None if own else _with_lead(tokenizer, FALLBACK_CHAT_TEMPLATE)


def template_source(tokenizer: Tokenizer, template: str | None) -> str:
    """Return the text of the chat template that messages are written by."""
    source = chat_template_of(tokenizer, template) or tokenizer.chat_template
    return source if isinstance(source, str) else json.dumps(source, sort_keys=True)


def _with_lead(tokenizer: Tokenizer, template: str) -> str:
    lead = leading_specials(tokenizer)
    if not lead:
        return template
    text = "".join(tokenizer.convert_ids_to_tokens(lead))
    try:
        question = [{"role": "user", "content": "QUESTION"}]
        written = render_chat(tokenizer, question, template=template)
    except DataError:
        raise
    except Exception:  # what it refuses is shown by the rows
        written = ""
    if written.startswith(text):
        return template
    name = "bos_token" if text == tokenizer.bos_token else json.dumps(text)
    return "{{ " + name + " }}" + template


def _is_frame(template: str) -> bool:
    return template != "chat" and "{%" not in template


def end_tokens(tokenizer: Tokenizer, template: Template) -> tuple[int | None, ...]:
    """Return the ids that end an answer: after a plain prompt, after one of a chat template, and
    after a call of a tool where that is another.

    The second is the first special token that the template writes after an assistant's words: some
    models end a turn with another token than a document (`<end_of_turn>`, not `<eos>`).
    """
    plain = tokenizer.eos_token_id
    _, end = _tail_and_end(tokenizer, template, _ANSWER)
    ends = [plain, plain if end is None else end]
    _, called = _tail_and_end(tokenizer, template, _CALL)
    return tuple(ends if called is None or called in ends else [*ends, called])


_MARK = "ANSWER"
_ANSWER: Message = {"role": "assistant", "content": _MARK}
_CALL: Message = {
    "role": "assistant",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "tool", "arguments": {"name": _MARK}},
        }
    ],
}


def _tail_and_end(
    tokenizer: Tokenizer, template: Template, answer: Message
) -> tuple[str, int | None]:
    """The text that the template writes after the words of a last answer, and the token in it that
    ends the answer: the first special one, else the first added one."""
    try:
        text = template.turns([{"role": "user", "content": "QUESTION"}, answer], open_answer=False)
    except RowFault:
        return "", None
    _, found, tail = text.rpartition(_MARK)
    if not found:
        return "", None
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special, added = special_ids(tokenizer), tokenizer.added_tokens_decoder
    # Of a call an added token may be the close of the call itself (`</tool_call>`).
    for kind in (special, added) if answer is _ANSWER else (special,):
        for token in ids:
            # Tokens of single bytes may be special too: only one that is written as itself ends.
            if token in kind and tokenizer.convert_ids_to_tokens(token) in tail:
                return tail, token
    return tail, None
