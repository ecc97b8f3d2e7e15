"""Keys of messages that a template writes are told apart from unused ones by the rendered text."""

from __future__ import annotations

from modern_llm.data.encode.message_keys import WrittenKeys
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.read.records import RowFault
from modern_llm.data.table.build import prepare_tables
from tests.helpers.chat_templates import CHATS
from tests.helpers.encoding import byte_level, recipe_of, trained_ids

USER = {"role": "user", "content": "Hi"}


def remarks(chat: str, **keys) -> list[str]:
    recipe = recipe_of(byte_level(chat=CHATS[chat].text), "answers")
    answer = {"role": "assistant", "content": "Five.", **keys}
    trained_ids(recipe, {"messages": [USER, answer]})
    found = recipe.remarks()
    assert recipe.remarks() == []
    return found


def test_an_unused_key_is_named():
    said = "keys of messages that the chat template does not write: "
    assert remarks("chatml", id=3, reasoning="why") == [said + "'id', 'reasoning'"]
    assert remarks("qwen3", reasoning="why") == [] == remarks("chatml", id=None)
    # This template reads the name of a call, never that of a speaker.
    assert remarks("qwen3", name="Ann") == [said + "'name'"]


def test_an_opening_that_the_conversation_lacks_is_named():
    (remark,) = remarks("deepseek-r1")
    assert "opens an answer with '<think>\\n'" in remark


def test_the_number_of_tested_keys_is_bounded():
    keys = WrittenKeys("{{ messages }}", lambda talk: "text")
    keys.see([{"role": "user", **{f"k{i}": 1 for i in range(5000)}}], "text")
    assert len(keys.take_unwritten()) == 1000


def test_a_template_that_needs_a_key_writes_it():
    def render(talk):
        if "name" not in talk[0]:
            raise RowFault("no name")
        return "text"

    keys = WrittenKeys("{{ name }}", render)
    keys.see([{**USER, "name": "Ann"}], "text")
    assert keys.take_unwritten() == []


def test_unread_columns_are_named(jsonl, tokenizer):
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "system": "s", "score": 3, "none": None}
    path = jsonl([row])
    config = PreferenceDatasetConfig(dataset_name=str(path))
    report = prepare_tables(config, tokenizer, path.parent / "t").report
    assert report.notes == [f"{path}: columns that are not read: 'score', 'system'"]
    chat = PreferenceDatasetConfig(dataset_name=str(path), template="chat")
    report = prepare_tables(chat, tokenizer, path.parent / "t").report
    assert report.notes[-1] == f"{path}: columns that are not read: 'score'"
