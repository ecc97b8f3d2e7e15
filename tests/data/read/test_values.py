"""Equal rows give equal records from every file type; lists stored as text are parsed."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from modern_llm.config import DocumentDatasetConfig, InstructionDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.read import sources
from modern_llm.data.read.records import Unreadable
from modern_llm.data.read.values import Columns
from modern_llm.data.table.build import prepare_tables

# Writes every key of a message, so that a missing or an additional one is noticed.
CHAT = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}<|done|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def chat(make_tokenizer):
    return make_tokenizer(chat=CHAT)


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


class Draw:
    """Random rows from a seed."""

    def __init__(self, seed: int):
        self._draw = random.Random(seed)
        self._first = True
        self._calls = 0

    def words(self) -> str:
        letters = self._draw.choices("ab ü'\"[{\\\n", k=self._draw.randrange(7))
        return "".join(letters) + str(self._draw.random())

    def arguments(self) -> dict[str, int]:
        """Return some of the keys, in the same order in all rows: Arrow keeps no other."""
        self._first, share = False, 1.0 if self._first else 0.5
        return {key: self._draw.randrange(9) for key in "abcd" if self._draw.random() < share}

    def conversation(self) -> dict[str, Any]:
        row: dict[str, Any] = {}
        if self._first or self._draw.random() < 0.5:
            kinds = self.arguments()
            row["tools"] = [tool(self.words(), {key: {"type": "integer"} for key in kinds})]
        turns = [{"role": "user", "content": self.words()}]
        if self._draw.random() < 0.5:
            self._first = self._first or self._calls == 0
            self._calls += 1
            called = call("f", self.arguments())
            turns.append({"role": "assistant", "content": "", "tool_calls": [called]})
            turns.append({"role": "tool", "content": self.words()})
        row["messages"] = [*turns, {"role": "assistant", "content": self.words()}]
        return row

    def pair(self, lists: bool) -> dict[str, Any]:
        answers: dict[str, Any] = {"chosen": self.words(), "rejected": self.words()}
        if lists:
            answers = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()}
        return {"prompt": f"q {self.words()}", **answers}


def as_jsonl(rows, place: Path) -> Path:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_json(rows, place: Path) -> Path:
    path = place / "rows.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def with_nulls(rows, place: Path) -> Path:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return as_jsonl([{key: row.get(key) for key in keys} for row in rows], place)


def table_of(rows) -> pyarrow.Table:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return pyarrow.table({key: [row.get(key) for row in rows] for key in keys})


def as_parquet(rows, place: Path) -> Path:
    path = place / "rows.parquet"
    pyarrow.parquet.write_table(table_of(rows), path, row_group_size=3)
    return path


def with_strange_columns(rows, place: Path) -> Path:
    table = table_of(rows)
    for name, array in {
        "when": pyarrow.array([2**43] * len(rows), pyarrow.timestamp("s", "Nowhere/City")),
        "blob": pyarrow.array([b"\xff"] * len(rows)),
        "map": pyarrow.array([[("a", 1), ("a", 2)]] * len(rows), pyarrow.map_("string", "int32")),
    }.items():
        table = table.append_column(name, array)
    path = place / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    return path


def on_disk(rows, place: Path) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset(table_of(rows)).save_to_disk(str(place / "saved"))
    return place / "saved" / "data-00000-of-00001.arrow"


def as_csv(rows, place: Path, dump=json.dumps) -> Path:
    path = place / "rows.csv"
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(keys)
        for row in rows:
            cells = (row.get(key, "") for key in keys)
            out.writerow([cell if isinstance(cell, str) else dump(cell) for cell in cells])
    return path


def as_pandas_csv(rows, place: Path) -> Path:
    return as_csv(rows, place, dump=str)


WAYS = (as_json, with_nulls, as_parquet, with_strange_columns, on_disk, as_csv, as_pandas_csv)


def content(build, config, tokenizer, folder: Path) -> list[Any]:
    table = build(config, tokenizer, folder, max_length=400).train
    return [
        [np.asarray(table.ids(at, name)).tolist() for name in table.columns]
        for at in range(len(table))
    ]


def same_everywhere(rows, build, section, tokenizer, place: Path) -> list[Any]:
    """Return the ids, which must be equal for all file types."""

    def ids(path: Path, folder: Path) -> list[Any]:
        config = section(dataset_name=str(path), max_dropped=1.0)
        return content(build, config, tokenizer, folder / "tables")

    expected = None
    for way in (as_jsonl, *WAYS):
        folder = place / way.__name__
        folder.mkdir()
        found = ids(way(rows, folder), folder)
        expected = expected or found
        assert found == expected, way.__name__
    return expected


def test_conversations_with_tools_are_the_same_from_every_file(chat, tmp_path):
    draw = Draw(0)
    rows = [draw.conversation() for _ in range(40)]
    found = same_everywhere(rows, prepare_tables, InstructionDatasetConfig, chat, tmp_path)
    assert len(found) == len(rows)
    assert "null" not in chat.decode([i for row in found for cell in row for i in cell])


@pytest.mark.parametrize("lists", [False, True], ids=["strings", "messages"])
def test_pairs_are_the_same_from_every_file(lists, chat, tmp_path):
    draw = Draw(1)
    rows = [draw.pair(lists) for _ in range(20)]
    found = same_everywhere(rows, prepare_tables, PreferenceDatasetConfig, chat, tmp_path)
    assert len(found) == len(rows)


def test_a_sequence_of_the_datasets_library_is_a_list_of_messages(chat, tmp_path, monkeypatch):
    """`Sequence({...})` is stored as an object of lists, in memory and in files."""
    rows = [
        [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}] for i in range(3)
    ]
    tables = [{key: [turn[key] for turn in turns] for key in ("from", "value")} for turns in rows]
    feature = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features({"conversations": datasets.Sequence(feature)})
    data = datasets.Dataset.from_dict({"conversations": tables}, features=features)
    assert isinstance(data[0]["conversations"], dict)
    data.to_parquet(str(tmp_path / "rows.parquet"))
    as_jsonl([{"conversations": table} for table in tables], tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    (tmp_path / "lists").mkdir()
    names = [
        as_jsonl([{"conversations": row} for row in rows], tmp_path / "lists"),
        tmp_path / "rows.jsonl",
        tmp_path / "rows.parquet",
        "owner/data",
    ]
    found = [
        content(
            prepare_tables,
            InstructionDatasetConfig(dataset_name=str(name)),
            chat,
            tmp_path / f"tables-{at}",
        )
        for at, name in enumerate(names)
    ]
    assert found[0] == found[1] == found[2] == found[3]


USER, ANSWER = {"role": "user", "content": "q's"}, {"role": "assistant", "content": 'a\n"b"'}
LISTS_AS_TEXT = {
    "JSON": json.dumps([USER, ANSWER]),
    "Python": str([USER, ANSWER]),
    "with space": f" \n{json.dumps([USER, ANSWER], indent=2)}\n",
    "other keys first": json.dumps([{"id": 1, **USER}, {"weight": None, **ANSWER}]),
    "ShareGPT": str([{"from": "human", "value": "q's"}, {"from": "gpt", "value": 'a\n"b"'}]),
    "columns": str({"role": ["user", "assistant"], "content": ["q's", 'a\n"b"']}),
}


@pytest.mark.parametrize("name", LISTS_AS_TEXT)
def test_a_list_of_messages_as_text_is_a_list(name: str):
    values = Columns({"messages": LISTS_AS_TEXT[name]})["messages"]
    assert [turn.get("content", turn.get("value")) for turn in values] == ["q's", 'a\n"b"']
    assert not any(value is None for turn in values for value in turn.values())


def test_a_message_as_text_is_a_message():
    assert Columns({"chosen": str(ANSWER)})["chosen"] == ANSWER


@pytest.mark.parametrize(
    "text",
    [
        str(np.array([USER, ANSWER])),  # as pandas writes the lists of a Parquet file
        str([USER, ANSWER])[:-1],
        "[" + str(USER) * 2 + "]",
        "[" * 9 + json.dumps([USER]),
    ],
    ids=["numpy", "cut", "no comma", "brackets"],
)
def test_a_list_of_messages_that_cannot_be_parsed_is_not_taken_as_text(
    text: str, jsonl, tokenizer, tmp_path
):
    path = jsonl([{"prompt": "p", "chosen": text, "rejected": "r"}])
    config = PreferenceDatasetConfig(dataset_name=str(path))
    if text.startswith("[["):
        assert Columns({"chosen": text})["chosen"] == text
        return
    with pytest.raises(DataError, match="'chosen' is a list of messages as text that is neither"):
        prepare_tables(config, tokenizer, tmp_path / "t", max_length=64)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"name": "Ada", "role": "engineer"}',
        '[{"role": "manager", "content": "x"}]',
        "[Note] say {'role': 'user'} first",
        'As JSON: [{"role": "user", "content": "x"}]',
        '{"request": {"messages": [{"role": "user", "content": "x"}]}}',
        "[]",
        "",
        " [ {",
    ],
)
def test_other_texts_stay_as_they_are(text: str):
    assert Columns({"chosen": text})["chosen"] == text


def test_a_document_is_literal(jsonl, tokenizer, tmp_path):
    text = json.dumps([USER, ANSWER])
    path = jsonl([{"text": text}] * 4)
    config = DocumentDatasetConfig(dataset_name=str(path))
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=16)
    assert tokenizer.decode(prepared.train.ids(0, "text")).startswith(text[:10])


def test_nulls_are_absent_and_named_where_a_value_is_required(jsonl, chat, tmp_path):
    rows = [{"instruction": "i", "input": None, "output": "o", "tools": None}]
    config = InstructionDatasetConfig(dataset_name=str(jsonl(rows)))
    (with_null,) = content(prepare_tables, config, chat, tmp_path / "a")
    del rows[0]["input"], rows[0]["tools"]
    config = InstructionDatasetConfig(dataset_name=str(jsonl(rows)))
    assert content(prepare_tables, config, chat, tmp_path / "b") == [with_null]
    for name in ("prompt", "chosen", "rejected"):
        row = {"prompt": "p", "chosen": "c", "rejected": "r", name: None}
        config = PreferenceDatasetConfig(dataset_name=str(jsonl([row])))
        with pytest.raises(DataError, match=f"rows.jsonl:1: column '{name}' is null"):
            prepare_tables(config, chat, tmp_path / "c", max_length=64)


def test_depth_is_bounded():
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert Columns({"a": deep})["a"] == Unreadable("nested too deep")


def test_a_stream_gives_the_same_rows(monkeypatch, tmp_path):
    rows = [{"text": f"t{i}", "more": [{"a": i, "b": None}]} for i in range(30)]
    table = datasets.Dataset.from_list(rows)
    stream = sources.StreamedDataset("owner/data", "train", "0", table.to_iterable_dataset(2))
    found = list(stream)
    assert [row.values["text"] for row in found] == [f"t{i}" for i in range(30)]
    assert Columns(found[3].values)["more"] == [{"a": 3}]
    assert found[29].origin == "owner/data/train:[29]"
