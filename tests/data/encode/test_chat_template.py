"""Strings stay literal, messages use the chat template, and the end token of a turn is found."""

from __future__ import annotations

import json

import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.encode.chat_template import (
    FALLBACK_CHAT_TEMPLATE,
    Template,
    chat_template_of,
    end_tokens,
)
from modern_llm.data.read.formats import message_instruction, message_pair
from modern_llm.data.read.records import RowFault

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|done|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": " q{prompt} "}]


def test_strings_are_literal_without_a_template(make_tokenizer):
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


def test_an_error_of_a_chat_template_is_a_fault_of_the_row(make_tokenizer):
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


TOOLS_CHAT = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{% endfor %}>"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def tool_row(**changes):
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    row = {
        "tools": [TOOL],
        "prompt": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "rain", "name": "weather"},
        ],
        "chosen": [{"role": "assistant", "content": "wet"}],
        "rejected": [{"role": "assistant", "content": "dry"}],
    }
    return row | changes


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_and_calls_before_the_answer_are_written_by_the_chat_template(make_tokenizer, tools):
    pair = message_pair(tool_row(tools=tools), "x:1")
    tokenizer = make_tokenizer(chat=TOOLS_CHAT)
    text, chat = Template(tokenizer, None).render(pair.prompt)
    assert text == "[weather ]<|system|>s<|user|>q<|assistant|>(weather)<|tool|>rain>" and chat
    row = tool_row()
    # The result of `transformers` for the same conversation.
    assert text == tokenizer.apply_chat_template(
        [m | {"content": m["content"] or ""} for m in row["prompt"]],
        tools=row["tools"], tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    row = {"tools": tools, "messages": [*row["prompt"], *row["chosen"]]}
    assert Template(tokenizer, None).render(message_instruction(row, "x:1").prompt)[0] == text


def test_a_template_without_tools_refuses_a_row_with_them(make_tokenizer):
    pair = message_pair(tool_row(), "x:1")
    with pytest.raises(RowFault, match="has tools and the chat template does not write them"):
        Template(make_tokenizer(chat=CHAT), None).render(pair.prompt)
    pair = message_pair(tool_row(tools=None), "x:1")
    with pytest.raises(RowFault, match="has tool_calls and the chat template does not"):
        Template(make_tokenizer(), None).render(pair.prompt)


@pytest.mark.parametrize(
    ("tools", "part"), [("[", "is no JSON"), ([1], "list of objects"), ({"a": 1}, "an object")]
)
def test_broken_tools_are_refused(tools, part):
    with pytest.raises(RowFault, match=part):
        message_pair(tool_row(tools=tools), "x:1")


def test_the_log_names_the_template_by_its_digest(make_tokenizer):
    own, other = make_tokenizer(chat=CHAT), make_tokenizer(chat=CHAT + " ")
    first, second = (Template(t, None).describe() for t in (own, other))
    assert "the tokenizer's own" in first and first != second
    assert first.split("(")[0] == Template(make_tokenizer(), CHAT).describe().split("(")[0].replace(
        "as user turns", "literally"
    )
    assert "fallback" in Template(make_tokenizer(), None).describe()
    assert "frame" in Template(own, "Q: {prompt}").describe()
