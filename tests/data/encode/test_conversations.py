"""Whole conversations: ids and masks of the assistant's turns, against `transformers`' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modern_llm import DPOConfig, TrainingConfig, run_dpo, run_sft
from modern_llm.cli import main
from modern_llm.config import (
    InstructionDatasetConfig,
    LabelledDatasetConfig,
    PreferenceDatasetConfig,
)
from modern_llm.data.encode.conversations import tokens_of
from modern_llm.data.encode.tokenizer import Encoder
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import ContentFault, RowFault
from modern_llm.data.table.build import prepare_tables
from modern_llm.data.table.gaps import none, trained_of
from modern_llm.data.table.iterate import RecordReader
from modern_llm.evaluation.score import score_pairs
from modern_llm.objectives.preference import preference_loss
from modern_llm.training.train_kto import KTOConfig, run_kto
from tests.helpers.chat_templates import CHATS
from tests.helpers.encoding import byte_level, recipe_of, sentence_piece

MARKED = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>"
    "{{ '\n' }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>\n' + ({'name': c.function.name, 'arguments': c.function.arguments} | tojson)"
    " + '\n</tool_call>' }}{% endfor %}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MEASURED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(text: str, number: int, **more: Any) -> dict[str, Any]:
    function = {"name": "add", "arguments": {"a": number}}
    return answer(text, tool_calls=[{"type": "function", "function": function}], **more)


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "add", "content": text}


COMMON = [user("What is 2 and 3?"), call("", 2, reasoning_content="Add."), result("2")]
CHOSEN = [call("Next.", 3), result('{"sum": 5}'), answer("It is 5.", reasoning_content="Five.")]
REJECTED = [call("Next.", 4), result("6"), call("Again.", 3), result("5"), answer("Six?")]
PAIRS = [
    {"tools": TOOLS, "chosen": [*COMMON, *CHOSEN], "rejected": [*COMMON, *REJECTED]},
    {"tools": TOOLS, "prompt": COMMON, "chosen": REJECTED, "rejected": [*CHOSEN, user("Thanks")]},
    {"tools": TOOLS, "prompt": COMMON[:1], "chosen": COMMON[1:] + CHOSEN, "rejected": REJECTED},
    {
        "prompt": "Hello?",
        "chosen": [answer("Yes, hello."), user("Who?"), answer("Me, the harbour.")],
        "rejected": [answer("Yes, no."), user("What?"), answer("Bread."), user("Oh"), answer("5")],
    },
    {"prompt": [user("Hi")], "chosen": [answer("One.")], "rejected": [answer("Two, three.")]},
]
SHARED_TURNS = (3, 3, 1, 1, 1)
TALKS = [
    {"tools": TOOLS, "messages": [*COMMON, *CHOSEN]},
    {"messages": [user("a"), answer("b"), user("c"), answer("d é 漢字", reasoning_content="e")]},
    {"messages": [user("only one"), answer("turn")]},
]


def sides_of(row: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The two conversations of a row of `PAIRS`, in plain Python."""
    prompt = row.get("prompt", [])
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    sides = [[*prompt, *row[name]] for name in ("chosen", "rejected")]
    return [side[:-1] if side[-1]["role"] == "user" else side for side in sides]


def whole(tokenizer: Any, kind: str, row: dict[str, Any], **section: Any) -> list[tuple]:
    """(ids, mask) of every cell of a row with `targets: all`; the prompt first."""
    recipe = recipe_of(tokenizer, kind, targets="all", **section)
    record = RecordReader(recipe.formats, recipe.name, recipe.mode, whole=recipe.whole)
    item = recipe.item(record(Row(row, "x:1")))
    cells = recipe.cells(recipe.split(item, recipe.encoder(item.texts)))
    gaps = cells.gaps or [none()] * len(cells)
    masks = [trained_of(each, len(ids)) for ids, each in zip(cells, gaps, strict=True)]
    masks[0][:] = False
    return [(ids.tolist(), mask.tolist()) for ids, mask in zip(cells, masks, strict=True)]


def plain(tokenizer: Any, messages: list[dict], tools: Any, shared: int) -> tuple[list, list]:
    """The ids and the assistant's mask as `transformers` has them, up to the last trained id;
    nothing of the first `shared` messages is trained on."""
    options = {"tools": tools, "chat_template": MARKED, "return_dict": True}
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    ids, mask = list(found["input_ids"]), list(map(bool, found["assistant_masks"]))
    before = []
    if shared:
        before = tokenizer.apply_chat_template(messages[:shared], **options)["input_ids"]
    mask[: len(before)] = [False] * len(before)
    end = max(at for at, trained in enumerate(mask) if trained) + 1
    return ids[:end], mask[:end]


def joined(prompt: tuple, response: tuple) -> tuple[list, list]:
    return prompt[0] + response[0], prompt[1] + response[1]


@pytest.mark.parametrize("template", [MARKED, MEASURED], ids=["marked", "measured"])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_pairs_have_the_ids_and_masks_of_transformers(make, template):
    tokenizer = make(chat=template)
    for row, shared in zip(PAIRS, SHARED_TURNS, strict=True):
        prompt, *responses = whole(tokenizer, "pairs", row)
        for messages, response in zip(sides_of(row), responses, strict=True):
            expected = plain(tokenizer, messages, row.get("tools"), shared)
            assert joined(prompt, response) == expected
        common = plain(tokenizer, sides_of(row)[0], row.get("tools"), 0)[0]
        assert prompt[0] == common[: len(prompt[0])]
        # The whole common start is computed once: it ends where the first answer begins.
        assert all(response[1][0] for response in responses)


@pytest.mark.parametrize("template", [MARKED, MEASURED], ids=["marked", "measured"])
@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_instructions_too(make, template):
    tokenizer = make(chat=template)
    for row in TALKS:
        expected = plain(tokenizer, row["messages"], row.get("tools"), 0)
        assert joined(*whole(tokenizer, "answers", row)) == expected


def test_labelled_responses_too(tmp_path, jsonl):
    talk = {"tools": TOOLS, "messages": [*COMMON, *CHOSEN], "label": True}
    tokenizer = byte_level(chat=MARKED)
    for rows, shared in (([PAIRS[0]], 3), ([talk], 0)):
        data = LabelledDatasetConfig(dataset_name=str(jsonl(rows)), targets="all")
        table = prepare_tables(data, tokenizer, tmp_path / "tables", max_length=1024).train
        sides = sides_of(PAIRS[0])
        for row in range(len(table)):
            ids = [*table.ids(row, "prompt").tolist(), *table.ids(row, "response").tolist()]
            expected = plain(tokenizer, sides[row], TOOLS, shared)
            assert ids == expected[0]
            assert table.trained[row, 1] == sum(expected[1])


def test_with_real_tokenizers(shared):
    from transformers import AutoTokenizer

    for name in ("gpt2", "bytes512"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
        end = tokenizer.eos_token
        marked, measured = (each.replace("<|im_end|>", end) for each in (MARKED, MEASURED))
        for row in TALKS:
            found = [whole(tokenizer, "answers", row, template=t) for t in (marked, measured)]
            assert found[0] == found[1]
            options = {"tools": row.get("tools"), "chat_template": marked, "return_dict": True}
            theirs = tokenizer.apply_chat_template(
                row["messages"], return_assistant_tokens_mask=True, **options
            )
            ids, mask = joined(*found[0])
            assert ids == theirs["input_ids"][: len(ids)]
            assert mask == list(map(bool, theirs["assistant_masks"]))[: len(ids)]


def test_one_turn_is_as_without_the_option():
    for make in (byte_level, sentence_piece):
        for name, chat in CHATS.items():
            tokenizer = make(chat=chat.text)
            row = {"messages": [user("What is two plus three?"), answer("Five, on average.")]}
            pair = {"chosen": row["messages"], "rejected": [row["messages"][0], answer("Wait.")]}
            for kind, values in (("answers", row), ("pairs", pair)):
                recipe = recipe_of(tokenizer, kind)
                record = RecordReader(recipe.formats, recipe.name, recipe.mode)
                item = recipe.item(record(Row(values, "x:1")))
                cells = recipe.cells(recipe.split(item, recipe.encoder(item.texts)))
                found = whole(tokenizer, kind, values)
                assert len(found) == len(cells)
                for (ids, mask), usual in zip(found[1:], cells[1:], strict=True):
                    assert found[0][0] + ids == [*cells[0].tolist(), *usual.tolist()], name
                    assert all(mask)
                # White space before an answer is the template's, however it is cut into tokens.
                more = tokenizer.decode(found[0][0][len(cells[0]) :])
                assert len(found[0][0]) >= len(cells[0]) and not more.strip(), name


def test_weights_of_messages():
    for template in (MARKED, MEASURED):
        tokenizer = byte_level(chat=template)
        row = {"messages": [user("a"), answer("b", weight=1), user("c"), answer("d", weight=0)]}
        _, (ids, mask) = whole(tokenizer, "answers", row)
        assert tokenizer.decode(ids) == "b<|im_end|>" and all(mask)
        row["messages"] += [user("e"), answer("f")]
        _, (ids, mask) = whole(tokenizer, "answers", row)
        trained = [token for token, mine in zip(ids, mask, strict=True) if mine]
        assert tokenizer.decode(trained) == "b<|im_end|>f<|im_end|>"
        row["messages"][1]["weight"] = 0.5
        with pytest.raises(RowFault, match="weight 0.5: only 0 .* and 1 are possible"):
            whole(tokenizer, "answers", row)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_reason():
    tokenizer = byte_level(chat=CHATS["qwen3"].text)
    talk = [user("a"), answer("b", reasoning_content="why"), user("c"), answer("d")]
    with pytest.raises(RowFault, match="up to turn 2 in another way when turns follow .*'<think>"):
        whole(tokenizer, "answers", {"messages": talk})
    # Of an agent's turns it keeps the thoughts.
    agent = [user("a"), call("b", 1, reasoning_content="why"), result("c"), answer("d")]
    _, (ids, mask) = whole(tokenizer, "answers", {"messages": agent})
    trained = tokenizer.decode([i for i, mine in zip(ids, mask, strict=True) if mine])
    assert "why" in trained and trained.endswith("d<|im_end|>") and "c<|im_end|>" not in trained


def test_generation_blocks_that_are_not_one_a_turn_are_refused():
    twice = MARKED.replace(
        "{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"
    )
    with pytest.raises(RowFault, match="marks 6 stretches as generated and there are 3 turns"):
        whole(byte_level(chat=twice), "answers", TALKS[0])


def test_blocks_whose_place_is_not_known_are_refused():
    inside = (
        "{% set text %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}{% endset %}{{ text | trim }}"
    )
    row = {"messages": [user("a"), answer("b"), user("c"), answer("d")]}
    with pytest.raises(RowFault, match="marks 0 stretches as generated"):
        whole(byte_level(chat=inside), "answers", row)


def test_blocks_without_the_end_token_are_reported():
    without = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    recipe = recipe_of(byte_level(chat=without), "answers", targets="all")
    record = RecordReader(recipe.formats, recipe.name, recipe.mode, whole=True)
    recipe.item(record(Row(TALKS[1], "x:1")))
    assert any("leave out the end token" in line for line in recipe.remarks())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("b")]}, "equal resp"),
        ({"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("b")]}, "no turn"),
        ({"chosen": [user("a"), answer(" ")], "rejected": [user("a"), answer("b")]}, "empty"),
        ({"chosen": [user("a")], "rejected": [user("a"), answer("b")]}, "no assistant turn"),
    ],
)
def test_pairs_with_nothing_to_learn_are_dropped(row, reason):
    with pytest.raises(ContentFault, match=reason):
        whole(byte_level(chat=MEASURED), "pairs", row)


def test_other_formats_train_on_their_earlier_answers():
    tokenizer = byte_level(chat=MEASURED)
    turns = {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]}
    history = {"history": [["a", "b"]], "instruction": "c", "output": "d"}
    given = {"prompt": [user("x"), answer("y"), user("a")]}
    given["completion"] = [answer("b"), user("c"), answer("d")]
    rows = (({}, turns), ({"template": "chat"}, history), ({}, given))
    for options, row in rows:
        _, (ids, mask) = whole(tokenizer, "answers", row, **options)
        trained = [token for token, mine in zip(ids, mask, strict=True) if mine]
        assert tokenizer.decode(trained) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_tokens_of_characters_are_those_of_the_text_before(make):
    tokenizer = make(chat=MEASURED)
    encoder = Encoder(tokenizer)
    text = "one  two\n\n three<|im_end|>\n é漢字 \n\n<tool_call>\n{1}\n</tool_call><|im_end|> x"
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets, ids = np.array(found["offset_mapping"]), np.array(found["input_ids"])
    checked = 0
    for at in range(1, len(text)):
        (before,) = encoder([text[:at]])
        if not np.array_equal(before, ids[: len(before)]):
            continue  # a token spans the place
        (((first, _)), ((_, end))) = tokens_of(offsets, [(at, len(text)), (0, at)])
        assert end == len(before), text[:at]
        assert first == len(before), text[:at]
        checked += 1
    assert checked > 10


# Whole runs


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The folder of a small Llama with a tokenizer whose template marks the assistant's turns."""
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    tokenizer = byte_level(chat=MARKED)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plain_sums(folder: Any, row: dict[str, Any], shared: int) -> list[tuple[float, int]]:
    """Log-prob sum and number of the assistant's tokens of each conversation, in plain PyTorch."""
    tokenizer = byte_level(chat=MARKED)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    sides = sides_of(row) if "chosen" in row else [row["messages"]]
    found = []
    for messages in sides:
        ids, mask = plain(tokenizer, messages, row.get("tools"), shared)
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [at for at, trained in enumerate(mask) if trained]
        found.append((sum(float(logprobs[at - 1, ids[at]]) for at in places), len(places)))
    return found


@pytest.mark.slow
def test_scores_are_those_of_plain_pytorch(tmp_path, jsonl, model):
    data = PreferenceDatasetConfig(dataset_name=str(jsonl(PAIRS)), targets="all")
    score_pairs(str(model), data, tmp_path / "scores.jsonl", max_length=1024)
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    for line, row, shared in zip(map(json.loads, lines), PAIRS, SHARED_TURNS, strict=True):
        for side, (total, count) in zip(
            ("chosen", "rejected"), plain_sums(model, row, shared), strict=True
        ):
            assert line[f"{side}_tokens"] == count
            assert line[f"policy_{side}"] == pytest.approx(total, rel=1e-5)


def logged(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dpo_counts_trained_tokens_alone(tmp_path, jsonl, model):
    fields = {"batch_size": len(PAIRS), "max_steps": 2, "log_every": 1, "learning_rate": 1e-3}
    data = PreferenceDatasetConfig(dataset_name=str(jsonl(PAIRS)), targets="all")
    train = TrainingConfig(run_name="a", output_dir=tmp_path / "simpo", **fields)
    run_dpo(model, train, DPOConfig(loss_type="simpo", beta=2.0, max_length=1024), data)
    both = [plain_sums(model, row, n) for row, n in zip(PAIRS, SHARED_TURNS, strict=True)]
    policy = torch.tensor([[total for total, _ in pair] for pair in both])
    lengths = torch.tensor([[count for _, count in pair] for pair in both])
    losses = preference_loss(
        policy, None, lengths, loss_type="simpo", beta=2.0, label_smoothing=0.0
    )
    assert logged(tmp_path / "simpo")[0]["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    # With a stored reference: it starts at ln 2, in trees as in rows of one answer.
    train = TrainingConfig(run_name="b", output_dir=tmp_path / "dpo", **fields)
    run_dpo(model, train, DPOConfig(max_length=1024), data)
    assert logged(tmp_path / "dpo")[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.slow
def test_kto_on_whole_conversations_is_the_same_with_a_stored_and_a_live_reference(
    tmp_path, jsonl, model
):
    data = LabelledDatasetConfig(dataset_name=str(jsonl(PAIRS)), targets="all")
    losses = []
    for reference in ("cache", "model"):
        fields = {"batch_size": 5, "max_steps": 3, "log_every": 1, "learning_rate": 1e-3}
        train = TrainingConfig(run_name="k", output_dir=tmp_path / reference, **fields)
        run_kto(model, train, KTOConfig(reference=reference, max_length=1024), data)
        losses.append([line["loss"] for line in logged(tmp_path / reference)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_sft_trains_on_every_turn(tmp_path, jsonl, model):
    fields = {"batch_size": len(TALKS), "max_steps": 1, "log_every": 1}
    train = TrainingConfig(run_name="s", output_dir=tmp_path / "sft", **fields)
    data = InstructionDatasetConfig(dataset_name=str(jsonl(TALKS)), targets="all", max_length=1024)
    run_sft(model, train, data)
    sums = [plain_sums(model, row, 0)[0] for row in TALKS]
    expected = -sum(total for total, _ in sums) / sum(count for _, count in sums)
    assert logged(tmp_path / "sft")[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_command_line_says_where_a_row_is_refused(tmp_path, jsonl, capsys):
    byte_level(chat=CHATS["qwen3"].text).save_pretrained(tmp_path / "tokenizer")
    talk = [user("a"), answer("b", reasoning_content="why"), user("c"), answer("d")]
    path = jsonl([TALKS[2], {"messages": talk}])
    words = ["inspect", "--data", str(path), "--tokenizer", str(tmp_path / "tokenizer")]
    words += ["--kind", "instructions", "--targets", "all"]
    assert main([*words, "--tokens", str(tmp_path / "out.jsonl"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["kept"] == 1 and shown["dropped"] == 1
    assert main(["inspect", "--data", str(path), "--kind", "documents", *words[3:5], "--targets",
                 "all"]) == 2  # fmt: skip
    assert "targets has no effect on documents" in capsys.readouterr().err
