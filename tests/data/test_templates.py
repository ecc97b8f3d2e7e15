"""Strings stay literal, messages go through the chat template, a turn's end token is found."""

from __future__ import annotations

import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.records import RowFault
from modern_llm.data.templates import (
    FALLBACK_CHAT_TEMPLATE,
    Template,
    chat_template_of,
    end_tokens,
)

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|done|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": " q{prompt} "}]


def test_strings_are_literal_unless_a_template_is_given(make_tokenizer):
    with_chat = make_tokenizer(chat=CHAT)
    prompt = " {prompt} {x}\n"
    assert Template(with_chat, None).render(prompt) == (prompt, False)
    frame = Template(with_chat, "Q: {prompt} {y} {prompt}\nA:")
    assert frame.render(prompt) == ("Q:  {prompt} {x}\n {y} {prompt}\nA:", False)
    wrapped = Template(with_chat, "chat").render(prompt)
    assert wrapped == ("<|user|> {prompt} {x}\n<|done|><|assistant|>", True)


def test_messages_go_through_the_chat_template_of_the_user_the_tokenizer_or_the_fallback(
    make_tokenizer,
):
    with_chat, without = make_tokenizer(chat=CHAT), make_tokenizer()
    own = Template(with_chat, None)
    assert own.render(TALK) == ("<|user|> q{prompt} <|done|><|assistant|>", True)
    assert not own.fell_back
    given = Template(with_chat, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>")
    assert given.render(TALK) == ("[ q{prompt} ]>", True)
    assert given.render("text") == ("[text]>", True)
    fallback = Template(without, None)
    assert fallback.render(TALK) == ("<|user|>\n q{prompt} <|end|>\n<|assistant|>\n", True)
    assert fallback.fell_back and chat_template_of(without, "chat") == FALLBACK_CHAT_TEMPLATE


def test_a_frame_for_strings_is_refused_for_messages(tokenizer):
    with pytest.raises(DataError, match="frames strings, and the prompts here are message lists"):
        Template(tokenizer, "Q: {prompt}").render(TALK)


def test_what_a_chat_template_raises_is_a_fault_of_the_row(make_tokenizer):
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}x"
    template = Template(make_tokenizer(chat=strict), None)
    assert template.render(TALK) == ("x", True)
    with pytest.raises(RowFault, match="chat template refuses the messages: user first"):
        template.render([{"role": "assistant", "content": "a"}])


@pytest.mark.parametrize(
    ("chat", "end"),
    [
        (None, "<|end|>"),
        (CHAT, "<|done|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "<|end|>"),
        ("{{ raise_exception('no') }}", "<|end|>"),
        ("{% for m in messages %}{{ m.content }} <|done|><|end|>{% endfor %}", "<|done|>"),
    ],
)
def test_an_answer_ends_as_the_template_ends_a_turn(chat, end, make_tokenizer):
    tokenizer = make_tokenizer(chat=chat)

    plain, turn = end_tokens(tokenizer, Template(tokenizer, None))
    assert tokenizer.convert_ids_to_tokens([plain, turn]) == ["<|end|>", end]
