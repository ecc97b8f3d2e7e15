"""Whole conversations: ids and masks of the assistant's turns, against `transformers`' own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.config import LabelledDatasetConfig
from modern_llm.data.encode.conversations import tokens_of
from modern_llm.data.encode.tokenizer import Encoder
from modern_llm.data.read.readers import Row
from modern_llm.data.read.records import ContentFault, RowFault
from modern_llm.data.table.build import prepare_tables
from modern_llm.data.table.gaps import none, trained_of
from modern_llm.data.table.iterate import RecordReader
from tests.helpers.chat_templates import CHATS
from tests.helpers.conversations import (
    CHOSEN,
    COMMON,
    MARKED,
    MEASURED,
    PAIRS,
    SHARED_TURNS,
    TALKS,
    TOOLS,
    answer,
    call,
    plain,
    result,
    sides_of,
    user,
)
from tests.helpers.encoding import byte_level, recipe_of, sentence_piece


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
def test_rankings_of_trajectories_too(template):
    """All share the question; two share a call and its result, which both are trained on."""
    tokenizer = byte_level(chat=template)
    sides = [[*COMMON[1:], *CHOSEN], [*COMMON[1:], answer("No.")], [call("Other.", 3)]]
    row = {"tools": TOOLS, "prompt": COMMON[:1], "responses": sides, "scores": [1, 2, 0]}
    prompt, *cells = whole(tokenizer, "pairs", row, rankings="whole")
    for cell, side in zip(cells[:3], (sides[1], sides[0], sides[2]), strict=True):
        assert joined(prompt, cell) == plain(tokenizer, [*COMMON[:1], *side], TOOLS, 1)
    assert not any(ids for ids, _ in cells[3:])
    with pytest.raises(RowFault, match="column 'responses', 0 has several turns: set data.targets"):
        recipe = recipe_of(tokenizer, "pairs", rankings="whole")
        RecordReader(recipe.formats, recipe.name, recipe.mode)(Row(row, "x:1"))
    broken = {**row, "responses": [*sides[:2], [user("a question")]]}
    with pytest.raises(ContentFault, match="no assistant turn"):
        whole(tokenizer, "pairs", broken, rankings="whole")


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
