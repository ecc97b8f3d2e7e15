"""The trained ids are those of the whole conversation, for every form of chat template."""

from __future__ import annotations

import json

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from modern_llm.data.encode.boundary import Boundary
from modern_llm.data.encode.tokenizer import Encoder
from modern_llm.data.read.records import ContentFault, RowFault
from modern_llm.inference.chat import prompt_ids
from tests.helpers.chat_templates import CHATS, Chat
from tests.helpers.encoding import byte_level, recipe_of, sentence_piece, trained_ids

TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level with BOS": byte_level(begin=True),
    "SentencePiece": sentence_piece(),
    "SentencePiece, first word only": sentence_piece(legacy=False),
}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


SYSTEM = {"role": "system", "content": "Answer briefly."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "3"}}}
TALKS = {
    "one turn": [user("What is two plus three?")],
    "white space at the ends": [user(" What is\n two plus three? \n")],
    "several turns": [user("Hi"), answer("Hello."), user("2+3?"), answer("5."), user("sure?")],
    "system": [SYSTEM, user("2+3?")],
    "an earlier thought": [user("Hi"), answer("Five.", reasoning_content="2, 3"), user("sure?")],
    "an earlier thought in the words": [user("Hi"), answer("<think>\na\n</think>\n\nb"), user("c")],
}
ANSWERS = ("Five.", " Five and more. ", "5", "\nSix.", "<think>\ntwo\n</think>\n\nThree.", "(a)")


@pytest.fixture(params=CHATS)
def chat(request):
    return CHATS[request.param]


def only(fact):
    """Run a test with the templates for which this holds."""
    names = [name for name, chat in CHATS.items() if fact(chat)]
    return pytest.mark.parametrize("chat", names, indirect=True)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request, chat):
    found = TOKENIZERS[request.param]
    found.chat_template = chat.text
    return found


def whole_ids(tokenizer, chat, messages, **options) -> list[int]:
    """Return the ids of the conversation up to its end marker, by `transformers` alone."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if chat.end is None:
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    words = messages[-1].get("content", "").strip()[-4:]
    at = text.index(chat.end, text.rindex(words) if words else 0) + len(chat.end)
    return tokenizer(text[:at], add_special_tokens=False)["input_ids"]


def talks(chat):
    for name, prompt in TALKS.items():
        if chat.system or prompt[0]["role"] != "system":
            yield name, prompt


def test_sft_rows_are_the_whole_conversation(tokenizer, chat):
    recipe = recipe_of(tokenizer, "answers")
    for name, prompt in talks(chat):
        for words in ANSWERS:
            messages = [*prompt, answer(words)]
            head, response = trained_ids(recipe, {"messages": messages})
            assert head + response == whole_ids(tokenizer, chat, messages), (name, words)
            assert head and response


def test_pairs_are_two_whole_conversations_with_one_prompt(tokenizer, chat):
    recipe = recipe_of(tokenizer, "pairs")
    for name, prompt in talks(chat):
        for good, bad in zip(ANSWERS, ANSWERS[1:], strict=False):
            row = {"prompt": prompt, "chosen": [answer(good)], "rejected": [answer(bad)]}
            head, *responses = trained_ids(recipe, row)
            wholes = [whole_ids(tokenizer, chat, [*prompt, answer(words)]) for words in (good, bad)]
            assert [head + ids for ids in responses] == wholes, (name, good, bad)
            full = [{**row, side: [*prompt, *row[side]]} for side in ("chosen", "rejected")]
            merged = {"chosen": full[0]["chosen"], "rejected": full[1]["rejected"]}
            assert trained_ids(recipe, merged) == [head, *responses]


def test_the_prompt_is_what_generation_is_given(tokenizer, chat):
    recipe = recipe_of(tokenizer, "answers")
    for name, prompt in talks(chat):
        head, _ = trained_ids(recipe, {"messages": [*prompt, answer("Five.")]})
        ((given,), _) = prompt_ids(tokenizer, [prompt], None)
        assert given[: len(head)] == head, name
        if chat.opens:
            # At most the token that spans the boundary belongs to the answer.
            assert len(given) - len(head) <= 2, name


def test_truncation_takes_the_start_of_the_prompt_and_the_end_of_the_answer(tokenizer, chat):
    prompt, words = [user("How far is the moon? " * 6)], "About 384,400 kilometres. " * 6
    messages = [*prompt, answer(words)]
    head, response = trained_ids(recipe_of(tokenizer, "answers"), {"messages": messages})
    lead = len(recipe_of(tokenizer, "answers").encoder.lead)
    lead *= head[:1] == [tokenizer.bos_token_id]
    room = len(response) + 8
    short = recipe_of(tokenizer, "answers", max_length=room, prompt=2)
    kept, whole = trained_ids(short, {"messages": messages})
    assert whole == response and head[:lead] + head[len(head) - len(kept) + lead :] == kept
    tight = recipe_of(tokenizer, "answers", max_length=40, prompt=8)
    kept, cut = trained_ids(tight, {"messages": messages})
    assert len(kept) + len(cut) == 40 and cut == response[: len(cut)]
    assert kept == head[:lead] + head[-8:]
    pairs = recipe_of(tokenizer, "pairs", max_length=40, prompt=8)
    row = {"prompt": prompt, "chosen": [answer("Near.")], "rejected": [answer(words)]}
    kept, chosen, rejected = trained_ids(pairs, row)
    assert chosen[-1] == response[-1] and rejected == response[: len(rejected)]
    assert len(kept) + len(rejected) == 40 and rejected[-1] != response[-1]


@only(lambda chat: chat.thoughts)
def test_thoughts_of_the_answer_are_written(tokenizer, chat):
    recipe, prompt = recipe_of(tokenizer, "pairs"), [user("2+3?")]
    for key in ("reasoning_content", "reasoning", "thinking"):
        good, bad = (answer("Five.", **{key: text}) for text in ("two and three", "a guess"))
        row = {"prompt": prompt, "chosen": [good], "rejected": [bad]}
        head, *responses = trained_ids(recipe, row)
        wholes = [whole_ids(tokenizer, chat, [*prompt, last]) for last in (good, bad)]
        assert [head + ids for ids in responses] == wholes
        assert "two and three" in tokenizer.decode(responses[0])


@only(lambda chat: chat.calls)
def test_calls_are_answers_and_their_arguments_objects(tokenizer, chat):
    calls = {"role": "assistant", "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "5"}
    function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    text = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}
    expected = calls if "c.function.arguments +" not in chat.text else text
    recipe = recipe_of(tokenizer, "answers")
    for last in (calls, text):
        row = {"messages": [user("2+3?"), last]}
        head, response = trained_ids(recipe, row)
        whole = tokenizer.apply_chat_template([user("2+3?"), expected], tokenize=False).rstrip()
        assert head + response == tokenizer(whole, add_special_tokens=False)["input_ids"]
        row = {"messages": [user("2+3?"), last, tool, answer("Five.")]}
        earlier = [user("2+3?"), expected, tool, answer("Five.")]
        assert sum(trained_ids(recipe, row), []) == whole_ids(tokenizer, chat, earlier)


@only(lambda chat: not chat.system and "raise_exception" in chat.text)
def test_a_row_that_a_template_refuses_is_refused(tokenizer, chat):
    with pytest.raises(RowFault, match="the chat template refuses the messages"):
        trained_ids(recipe_of(tokenizer, "answers"), {"messages": [SYSTEM, user("a"), answer("b")]})


# Cases that no family has


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | length }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}",
         "writes the turns before the answer in another way .*from character 1 on"),
        ("{% for m in messages %}{% if loop.last %}LAST {% endif %}[{{ m.content }}]{% endfor %}",
         "writes the turns before the answer in another way"),
        ("<|user|>{{ messages[0].content }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
         "writes nothing for the answer"),
    ],
)  # fmt: skip
def test_a_row_whose_prompt_cannot_be_found_is_refused(template, reason):
    recipe = recipe_of(byte_level(chat=template), "answers")
    with pytest.raises(RowFault, match=reason):
        trained_ids(recipe, {"messages": [user("What is it?"), answer("Five.")]})


def test_answers_that_differ_only_in_unwritten_keys_are_equal():
    recipe = recipe_of(byte_level(chat=CHATS["gemma"].text), "pairs")
    row = {"prompt": [user("a")], "chosen": [answer(" b")], "rejected": [answer("b ")]}
    with pytest.raises(ContentFault, match="^equal responses$"):
        trained_ids(recipe, row)
    row = {"prompt": [user("a")], "chosen": [answer("b", reasoning="x")], "rejected": [answer("b")]}
    with pytest.raises(ContentFault, match="does not write 'reasoning'"):
        trained_ids(recipe, row)


def test_an_existing_end_token_is_not_doubled():
    recipe = recipe_of(byte_level(chat=CHATS["chatml"].text), "answers")
    twice, once = (
        trained_ids(recipe, {"messages": [user("a"), answer(words)]})
        for words in ("b<|im_end|>", "b")
    )
    assert twice == once


def test_append_end_token_is_for_answers_that_the_template_leaves_open():
    for name in ("chatml", "no end token"):
        tokenizer, row = byte_level(chat=CHATS[name].text), {"messages": [user("a"), answer("b")]}
        with_end = trained_ids(recipe_of(tokenizer, "answers"), row)
        without = trained_ids(recipe_of(tokenizer, "answers", append_end_token=False), row)
        assert (with_end == without) == (name == "chatml")
        assert with_end[1][-1] == tokenizer.convert_tokens_to_ids(CHATS[name].end or "</s>")


# Strings

TEXTS = [
    ("What is two plus three?", " 5."),
    ("What is two plus three?", "5."),
    ("What is two plus three? ", "Five."),
    ("\n\nHuman: Hi\n\nAssistant:", " Hello.\n\nThere"),
    ("Answer:\n", "two and three"),
    ("", "The harbour"),
    ("Answer", "ing the harbour"),
    ("[INST] Hi [/INST]", " Five"),
]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_strings_are_the_ids_of_the_joined_text_if_the_boundary_allows(name):
    tokenizer = TOKENIZERS[name]
    tokenizer.chat_template = None
    pairs, answers = recipe_of(tokenizer, "pairs"), recipe_of(tokenizer, "answers")
    lead = tokenizer("a")["input_ids"][: len(answers.encoder.lead)]
    for prompt, words in TEXTS:
        head, response = trained_ids(answers, {"prompt": prompt, "response": words})
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = tokenizer(prompt + words, add_special_tokens=False)["input_ids"]
        assert head == lead + given, "as at inference"
        if name.startswith("Sent") and whole[: len(given)] == given:
            assert head + response == [*lead, *whole, tokenizer.eos_token_id]
        elif name.startswith("byte"):
            alone = tokenizer(words, add_special_tokens=False)["input_ids"]
            assert response == [*alone, tokenizer.eos_token_id]
        assert tokenizer.decode(head[len(lead) :] + response[:-1]) == tokenizer.decode(whole)
        row = {"prompt": prompt, "chosen": words, "rejected": words + " no"}
        assert trained_ids(pairs, row)[:2] == [head, response]


def test_the_added_marker_is_found_by_measuring():
    marks = {
        name: Boundary(Encoder(tokenizer), tokenizer, (0, 0), True).marks
        for name, tokenizer in TOKENIZERS.items()
    }
    assert marks == {name: name.startswith("Sent") for name in TOKENIZERS}
    prefixed = byte_level()
    prefixed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert Boundary(Encoder(prefixed), prefixed, (0, 0), True).marks


@pytest.mark.parametrize("options", [{}, {"template": "Q: {prompt}\nA:"}, {"template": "chat"}])
def test_a_bos_of_plain_text_is_in_every_form(options):
    for tokenizer in (byte_level(begin=True), sentence_piece()):
        bos = tokenizer.bos_token_id
        rows = [{"prompt": "2+3?", "response": "five"}]
        if options.get("template", "chat") == "chat":
            rows.append({"messages": [user("2+3?"), answer("five")]})
        for row in rows:
            ids = sum(trained_ids(recipe_of(tokenizer, "answers", **options), row), [])
            assert ids[0] == bos and ids.count(bos) == 1


def test_there_is_one_bos_from_tokenizer_or_template():
    row = {"messages": [user("2+3?"), answer("five")]}
    plain = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    tokenizer = byte_level(begin=True, chat=plain)
    bos = tokenizer.bos_token_id
    # The model's own template omits it.
    assert bos not in trained_ids(recipe_of(tokenizer, "answers"), row)[0]
    given = recipe_of(tokenizer, "answers", template=plain)
    assert trained_ids(given, row) == trained_ids(recipe_of(tokenizer, "answers"), row)
    for other in (plain.replace("<|user|>", "<|head|>"), "<s>" + plain, "{{ bos_token }}" + plain):
        ids = trained_ids(recipe_of(tokenizer, "answers", template=other), row)[0]
        assert ids[0] == bos and ids.count(bos) == 1


@pytest.mark.real_model
def test_a_real_chat_tokenizer(real_model):
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    chat = Chat(tokenizer.chat_template, "<|im_end|>")
    pairs, answers = recipe_of(tokenizer, "pairs"), recipe_of(tokenizer, "answers")
    for prompt in TALKS.values():
        for good, bad in zip(ANSWERS, ANSWERS[1:], strict=False):
            wholes = [whole_ids(tokenizer, chat, [*prompt, answer(words)]) for words in (good, bad)]
            row = {"prompt": prompt, "chosen": [answer(good)], "rejected": [answer(bad)]}
            head, *responses = trained_ids(pairs, row)
            assert [head + ids for ids in responses] == wholes
            row = {"messages": [*prompt, answer(good)]}
            assert sum(trained_ids(answers, row), []) == wholes[0]
