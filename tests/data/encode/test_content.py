"""Messages whose content is a list of parts: the ids are those of the template's own rendering."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from modern_llm.cli import main
from modern_llm.config import InstructionDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.encode.content import text_of_parts
from modern_llm.data.read.records import ContentFault, RowFault
from modern_llm.data.table.build import prepare_tables
from modern_llm.inference.chat import prompt_ids
from tests.helpers.encoding import byte_level, recipe_of, sentence_piece, trained_ids
from tests.helpers.text import write_jsonl

TURN = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PARTS = (
    "{% for part in m.content %}{% if part.type == 'image' %}<image>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
)
EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
LINES = "{{ m.content if m.content is string else m.content | map(attribute='text') | join('\n') }}"
FIRST = "{{ m.content if m.content is string else m.content[0].text }}"
USER = "{% if m.role == 'user' %}" + PARTS + "{% else %}{{ '' + m.content }}{% endif %}"
# Template -> the forms of a text, and of parts, that it accepts from a user and an assistant.
FORMS = {
    "{{ m.content }}": ("text", "text"),
    "{{ m.content | trim }}": ("text", "text"),
    "{{ m.content | tojson }}": ("text", "text"),
    "{{ '' + m.content }}": ("text", "text"),
    FIRST: ("text", "text"),
    EITHER: ("given", "given"),
    LINES: ("given", "given"),
    PARTS: ("parts", "parts"),
    USER: ("parts", "text"),
}


def parts_of(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def in_form(messages: list[dict], user: str, assistant: str) -> list[dict]:
    found = []
    for message in messages:
        content = message["content"]
        form = assistant if message["role"] == "assistant" else user
        if form == "text" and isinstance(content, list):
            content = "".join(part["text"] for part in content)
        if form == "parts" and isinstance(content, str):
            content = parts_of(content)
        found.append({**message, "content": content})
    return found


def talk(answer) -> list[dict]:
    return [
        {"role": "user", "content": parts_of("Hi", " there")},
        {"role": "assistant", "content": parts_of("Hello.")},
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": answer},
    ]


def whole_ids(tokenizer, messages: list[dict], form: str) -> list[int]:
    text = tokenizer.apply_chat_template(in_form(messages, *FORMS[form]), tokenize=False)
    return tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]


@pytest.fixture(params=["byte-level", "SentencePiece"])
def make(request):
    return byte_level if request.param == "byte-level" else sentence_piece


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_the_templates_rendering_of_the_form_that_it_accepts(form, make):
    tokenizer = make(chat=TURN % form + OPEN)
    answers = (parts_of("Five", ", or so."), "Six.", parts_of("7"))
    recipe = recipe_of(tokenizer, "answers")
    for answer in answers:
        head, response = trained_ids(recipe, {"messages": talk(answer)})
        assert head + response == whole_ids(tokenizer, talk(answer), form)
        assert prompt_ids(tokenizer, [talk(answer)[:-1]], None)[0] == [head]
    recipe = recipe_of(tokenizer, "pairs")
    good, bad = answers[:2]
    head, *pair = trained_ids(recipe, {"chosen": talk(good), "rejected": talk(bad)})
    expected = [whole_ids(tokenizer, talk(answer), form) for answer in (good, bad)]
    assert [head + ids for ids in pair] == expected
    row = {"prompt": talk(good)[:-1], "chosen": talk(good)[-1:], "rejected": talk(bad)[-1:]}
    assert trained_ids(recipe, row) == [head, *pair]


def test_system_messages_and_sharegpt_turns_may_be_parts():
    tokenizer = byte_level(chat=TURN % EITHER + OPEN)
    turns = [
        {"role": "system", "content": parts_of("Answer", " briefly.")},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": parts_of("Hello.")},
    ]
    recipe = recipe_of(tokenizer, "answers")
    head, response = trained_ids(recipe, {"messages": turns})
    assert head + response == whole_ids(tokenizer, turns, EITHER)
    row = {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns]}
    assert trained_ids(recipe, row) == [head, response]
    row = {"messages": turns[1:], "system": "Answer briefly."}
    assert trained_ids(recipe, row) == [head, response]


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "part 1 has the type 'image_url': only"),
        ({"type": "text"}, "part 1 has no string 'text'"),
        ({"type": "text", "text": 5}, "part 1 has no string 'text'"),
        ({"text": "a"}, "part 1 is no object with a 'type'"),
        ("a", "part 1 is no object with a 'type'"),
        ({"type": "text", "text": "\ud800"}, "part 1 holds "),
    ],
)
def test_a_part_that_is_not_text_is_broken_structure(part, reason, tmp_path):
    row = {"messages": talk([*parts_of("a"), part])}
    recipe = recipe_of(byte_level(chat=TURN % EITHER), "answers")
    with pytest.raises(RowFault, match=f"column 'messages', message 3, 'content', {reason}"):
        trained_ids(recipe, row)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"messages": talk("a")}, row])
    config = InstructionDatasetConfig(dataset_name=str(data))
    with pytest.raises(DataError, match=rf"rows\.jsonl:2:.*({reason}|lone surrogate)"):
        prepare_tables(config, byte_level(chat=TURN % EITHER), tmp_path / "t")


def test_parts_without_words_are_an_empty_answer():
    recipe = recipe_of(byte_level(chat=TURN % EITHER), "answers")
    for content in ([], parts_of("", " ")):
        with pytest.raises(ContentFault, match="empty response"):
            trained_ids(recipe, {"messages": talk(content)})
    pairs = recipe_of(byte_level(chat=TURN % EITHER), "pairs")
    with pytest.raises(ContentFault, match="equal responses"):
        trained_ids(pairs, {"chosen": talk("ab"), "rejected": talk(parts_of("a", "b"))})


@pytest.mark.parametrize("form", [EITHER, "{{ m.content }}"])
def test_inspect_writes_the_ids_of_the_whole_conversation(form, tmp_path, capsys):
    tokenizer = byte_level(chat=TURN % form + OPEN)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    answers = (parts_of("Five", ", or so."), "Six.")
    pair = {"chosen": talk(answers[0]), "rejected": talk(answers[1])}
    for kind, row, columns in (
        ("preferences", pair, ("chosen_ids", "rejected_ids")),
        ("instructions", {"messages": talk(answers[0])}, ("response_ids",)),
    ):
        data = write_jsonl(tmp_path / f"{kind}.jsonl", [row])
        words = ["--data", str(data), "--tokenizer", str(tmp_path / "tokenizer"), "--kind", kind]
        assert main(["inspect", *words, "--tokens", str(tmp_path / "out")]) == 0
        found = json.loads((tmp_path / "out").read_text())
        for column, answer in zip(columns, answers, strict=False):
            whole = whole_ids(tokenizer, talk(answer), form)
            assert found["prompt_ids"] + found[column] == whole
        capsys.readouterr()


def test_parts_survive_a_copy():
    text = text_of_parts(parts_of("a", "b"), "x")
    for same in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert same == "ab" and list(same.parts) == parts_of("a", "b")
