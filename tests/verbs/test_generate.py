"""`generate`: batches, streams and talks give the same answers; messages go through the chat
template."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm.cli import main
from modern_llm.config.printable import printable
from modern_llm.data.encode.chat_template import FALLBACK_CHAT_TEMPLATE
from modern_llm.inference.chat import Answerer


def plain(place, text: str, tokens: int = 6) -> str:
    """What `transformers` itself answers to a text."""
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    output = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def rendered(place, messages) -> str:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    return tokenizer.apply_chat_template(
        messages, chat_template=FALLBACK_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )


def user(text):
    return {"role": "user", "content": text}


def words(place) -> list[str]:
    return ["generate", "--model", str(place / "model"), "--max_new_tokens", "6"]


def test_streams_print_what_batches_answer(place, capsys):
    assert main([*words(place), "--prompt", "the red river"]) == 0
    whole = capsys.readouterr().out
    assert main([*words(place), "--prompt", "the red river", "--stream"]) == 0
    assert capsys.readouterr().out == whole
    assert whole.rstrip("\n") == printable(plain(place, "the red river")).rstrip("\n")


def test_message_lists_go_through_the_chat_template(place, tmp_path, capsys):
    talk = [{"role": "system", "content": "be brief"}, user("a red cat"),
            {"role": "assistant", "content": "yes"}, user("why")]  # fmt: skip
    rows = [{"messages": talk}, {"prompt": talk[1:2]}, {"prompt": "the cat"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    assert main([*words(place), "--prompts", str(file), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    expected = [rendered(place, talk), rendered(place, talk[1:2]), "the cat"]
    assert [a["answer"] for a in answers] == [plain(place, text) for text in expected]
    assert main([*words(place), "--prompt", "why", "--system", "be brief", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert answer["answer"] == plain(place, rendered(place, [talk[0], user("why")]))


def test_a_talk_remembers_its_turns_until_it_is_new(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a red cat\nwhy\n\n/new\nwhy\n"))
    options = ["--interactive", "--template", "chat", "--json"]
    assert main([*words(place), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [a["prompt"] for a in found] == ["a red cat", "why", "why"]
    first = plain(place, rendered(place, [user("a red cat")]))
    turns = [user("a red cat"), {"role": "assistant", "content": first}, user("why")]
    assert [a["answer"] for a in found] == [
        first, plain(place, rendered(place, turns)), plain(place, rendered(place, [user("why")]))
    ]  # fmt: skip


def test_commands_and_prompts_of_several_lines(place, capsys, monkeypatch):
    lines = ["/help", "a red\\", "cat", "/reset", '"""', "why", "", "not", '"""', "/exit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert main([*words(place), "--interactive", "--template", "chat", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])["answers"]
    assert [a["prompt"] for a in found] == ["a red\ncat", "why\n\nnot"]
    assert found[1]["answer"] == plain(place, rendered(place, [user("why\n\nnot")]))
    assert "/reset  a new conversation" in err and "a new conversation\n" in err


def test_an_interrupt_ends_one_answer_alone(place, capsys, monkeypatch):
    real, calls = Answerer.stream, []

    def stream(self, prompt):
        calls.append(prompt)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, prompt)

    monkeypatch.setattr(Answerer, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("a red cat\nlong\nwhy\n"))
    assert main([*words(place), "--interactive", "--template", "chat", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [a["prompt"] for a in json.loads(out.splitlines()[-1])["answers"]] == [
        "a red cat",
        "why",
    ]
    assert "(stopped; this turn is left out)" in err
    assert [turn["content"] for turn in calls[2]][::2] == ["a red cat", "why"]


def test_without_a_chat_template_each_line_stands_alone(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a red cat\nwhy"))
    assert main([*words(place), "--interactive", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [a["answer"] for a in found] == [plain(place, "a red cat"), plain(place, "why")]


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--interactive", "--prompt", "x"], "interactive and prompt exclude"),
        (["--interactive", "--system", "x"], "system has no effect without a chat template"),
        (["--stream", "--batch_size", "2", "--prompt", "x"], "batch_size has no effect"),
        (["--stream", "--json", "--prompt", "x"], "stream and json exclude"),
        (["--system", "x", "--template", "Q {prompt}", "--prompt", "y"], "no effect with a frame"),
        (["--top_p", "0.5", "--prompt", "y"], "top_p has no effect"),
    ],
)
def test_bad_usage_is_one_line(place, more, part, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main([*words(place), *more]) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{}", "field prompt"),
        ('{"prompt": 3}', "must be a string or messages"),
        ('{"messages": [{"content": "x"}]}', "a message has no role"),
    ],
)
def test_a_bad_line_of_prompts_is_named(place, tmp_path, line, part, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line)
    assert main([*words(place), "--prompts", str(file)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:2" in err and part in err


def test_a_chat_model_that_is_given_plain_text_is_pointed_at_its_template(place, tmp_path, capsys):
    assert main([*words(place), "--prompt", "the cat"]) == 0
    assert "chat template" not in capsys.readouterr().err
    shutil.copytree(place / "model", tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(FALLBACK_CHAT_TEMPLATE)
    asks = ["generate", "--model", str(tmp_path / "chat"), "--max_new_tokens", "2"]
    assert main([*asks, "--prompt", "the cat"]) == 0
    assert "add --template chat to ask it" in capsys.readouterr().err
    for quiet in ("chat", "{prompt}"):
        assert main([*asks, "--prompt", "the cat", "--template", quiet]) == 0
        assert "--template chat" not in capsys.readouterr().err
