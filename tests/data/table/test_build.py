"""From files to tables: bad rows, held-out rows, reuse, and clean-up after a failure."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modern_llm.config.errors import DataError, UserError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table import iterate as module
from modern_llm.data.table.build import Prepared, prepare_tables, sample_texts
from modern_llm.data.table.iterate import share_of

STRINGS = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture
def build(tmp_path: Path, tokenizer) -> Callable[..., Prepared]:
    def make(path: Path, folder: str = "tables", **options: Any) -> Prepared:
        config = PreferenceDatasetConfig(dataset_name=str(path), **options)
        return prepare_tables(config, tokenizer, tmp_path / folder, max_length=64)

    return make


def listed(tmp_path: Path) -> list[tuple[str, str]]:
    lines = (tmp_path / "tables" / "dropped_rows.jsonl").read_text().splitlines()
    return [(entry["origin"], entry["reason"]) for entry in map(json.loads, lines)]


def words(prepared: Prepared, tokenizer) -> list[list[str]]:
    table = prepared.train
    return [[tokenizer.decode(table.ids(i, c)) for c in table.columns] for i in range(len(table))]


def test_rows_become_ids_in_order(build, jsonl, pairs, tokenizer):
    rows = pairs(7)
    prepared = build(jsonl(rows))
    assert words(prepared, tokenizer) == [
        [row["prompt"], row["chosen"] + "<|end|>", row["rejected"] + "<|end|>"] for row in rows
    ]
    assert prepared.train.columns == ("prompt", "chosen", "rejected")
    assert [prepared.train.origin(i)[-7:] for i in (0, 6)] == ["jsonl:1", "jsonl:7"]
    assert prepared.evaluation is None and prepared.evaluation_report is None
    report = prepared.report.as_dict()
    assert report["rows"] == report["kept"] == report["examples"] == 7
    assert report["formats"] == {"strings": 7} and report["dropped"] == 0
    assert report["tokens"] == prepared.train.lengths.sum()


def test_batches_change_nothing(build, jsonl, pairs, monkeypatch):
    path = jsonl(pairs(25))
    whole = build(path, "whole").train.digest
    for rows, characters in [(1, 10**6), (4, 10**6), (1000, 60)]:
        monkeypatch.setattr(module, "_BATCH_ROWS", rows)
        monkeypatch.setattr(module, "_BATCH_CHARACTERS", characters)
        assert build(path, f"{rows}-{characters}").train.digest == whole


def test_rows_are_read_as_needed(jsonl, pairs, tokenizer, monkeypatch):
    """At most one batch is in memory between the source and the table."""
    monkeypatch.setattr(module, "_BATCH_ROWS", 10)
    from modern_llm.data.encode.pipeline import answers_recipe
    from modern_llm.data.read.sources import open_source
    from modern_llm.data.table.counts import DataReport, Drops

    config = PreferenceDatasetConfig(dataset_name=str(jsonl(pairs(100))))
    recipe = answers_recipe(config, tokenizer, max_length=64, max_prompt_length=None)
    drops = Drops(None, DataReport("x"))
    batches = module.in_batches(
        module.read_items(open_source(config.dataset_name), config, recipe, drops)
    )
    for number in range(1, 4):
        assert len(next(batches)) == 10
        assert drops.report.rows == 10 * number


CONTENT = [
    ({**STRINGS, "chosen": " "}, "empty response"),
    ({**STRINGS, "rejected": "c"}, "equal responses"),
    (
        {**STRINGS, "chosen": "same " * 80 + "x", "rejected": "same " * 80 + "y"},
        "equal responses after",
    ),
    ({**STRINGS, "chosen": "c", "rejected": "c<|end|>"}, "equal responses after truncation"),
    ({**STRINGS, "prompt": "", "chosen": "<|end|><|end|>"}, "empty response"),
]


def test_bad_content_is_dropped_counted_and_listed(build, jsonl, pairs, tmp_path):
    rows = pairs(95)
    for number, (row, _) in enumerate(CONTENT):
        rows.insert(10 * number, row)
    path = jsonl(rows)
    prepared = build(path)
    report = prepared.report
    assert (report.rows, report.kept, report.dropped, len(prepared.train)) == (100, 95, 5, 95)
    assert report.drops == {
        "empty response": 2,
        "equal responses": 1,
        "equal responses after truncation": 2,
    }
    # In the order of detection: some before tokenisation, the others after their batch.
    found = sorted(listed(tmp_path), key=lambda entry: int(entry[0].rpartition(":")[2]))
    assert [origin for origin, _ in found] == [f"{path}:{10 * n + 1}" for n in range(5)]
    for (_, reason), (_, expected) in zip(found, CONTENT, strict=True):
        assert reason.startswith(expected)
    assert "dropped 5: 2 empty response, 1 equal responses" in "\n".join(report.lines())


def test_more_than_the_allowed_share_is_an_error(build, jsonl, pairs, tmp_path):
    path = jsonl([*pairs(94), *[row for row, _ in CONTENT], {**STRINGS, "chosen": ""}])
    with pytest.raises(DataError) as caught:
        build(path)
    text = str(caught.value)
    assert text.startswith(
        f"{path}: 6 of 100 rows (6.0%) are bad in content, more than max_dropped 5.0%"
    )
    assert "3 empty response" in text and f"First: {path}:95 (empty response)" in text
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert build(path, max_dropped=0.06).report.dropped == 6


def test_a_source_of_bad_rows_only_is_always_an_error(build, jsonl):
    path = jsonl([{**STRINGS, "chosen": ""}] * 3)
    with pytest.raises(DataError, match="all 3 rows are bad: 3 empty response. First: .*:1 .empty"):
        build(path, max_dropped=1.0)


@pytest.mark.parametrize("content", [[], [b""], [b"  ", b""]])
def test_an_empty_source_is_an_error(content, build, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows$"):
        build(jsonl(content))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


BROKEN = {
    "corrupt": (b'{"prompt": "p", "chosen"', ":25: corrupt JSON: Expecting ':' delimiter"),
    "invalid UTF-8": (b'{"prompt": "\xff"}', ":13: invalid UTF-8 (byte 0xff)"),
    "duplicate": (b'{"prompt": "a", "prompt": "b"}', ":17: duplicate key 'prompt'"),
    "NUL": (b'{"prompt": "\\u0000"}', ":13: a NUL character"),
    "surrogate": (b'{"prompt": "\\udc00"}', ":13: a lone surrogate U+DC00"),
    "deep": (b"[" * 100_000, ":1: JSON nested too deep"),
    "no object": (b"[1]", ":1: a JSON array where an object belongs"),
    "missing column": (
        {"prompt": "p", "chosen": "c"},
        ": column 'rejected' is missing; the row has",
    ),
    "null": ({**STRINGS, "chosen": None}, ": column 'chosen' is null"),
    "wrong type": ({**STRINGS, "prompt": 7}, ": column 'prompt' is a number, expected a string"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_structure_stops_with_its_place(name, build, jsonl, pairs, tmp_path):
    row, message = BROKEN[name]
    good = pairs(8)
    path = jsonl([*good[:4], row, *good[4:], row])
    with pytest.raises(DataError) as caught:
        build(path)
    text = str(caught.value)
    assert text.startswith(f"{path}:5{message}")
    assert "(2 broken of 10 rows read; fix them, or on_bad_row: skip drops such rows)" in text
    assert "\n" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_structure_can_be_skipped(name, build, jsonl, pairs, tmp_path):
    row, message = BROKEN[name]
    path = jsonl([row, *pairs(3), row])
    prepared = build(path, on_bad_row="skip")
    assert len(prepared.train) == prepared.report.kept == 3
    assert prepared.report.drops == {"broken structure": 2}
    (first, reason), (last, _) = listed(tmp_path)
    assert (first, last) == (f"{path}:1", f"{path}:5")
    # The first row sets the format only if it fits one.
    if name == "missing column":
        assert reason.startswith("column 'rejected' is missing") or "no format for" in reason
    else:
        assert message.rpartition(": ")[2] in reason


def test_rows_of_no_known_format_name_the_columns(build, jsonl):
    path = jsonl([{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r":1: no format for the columns \['answer', 'question'\]"):
        build(path)


def test_a_named_format_is_used_without_detection(build, jsonl, tokenizer):
    turn = "\n\nHuman: a\n\nAssistant:"
    row = {"prompt": "x", "chosen": turn + " yes", "rejected": turn + " no"}
    assert words(build(jsonl([row]), "hh", format="hh"), tokenizer)[0][:2] == [turn, " yes<|end|>"]
    assert words(build(jsonl([row]), "auto"), tokenizer)[0][0] == "x"
    with pytest.raises(DataError, match=":1: column 'labels' is missing; the row has"):
        build(jsonl([row]), "shp", format="shp")


def test_the_first_rows_only(build, jsonl, pairs):
    path = jsonl([*pairs(5), b"corrupt"])
    prepared = build(path, max_examples=5)
    assert prepared.report.rows == len(prepared.train) == 5
    with pytest.raises(DataError, match=":6:1: corrupt JSON"):
        build(path, max_examples=6)


def digests(table) -> set[str]:
    return {table.select([i]).digest for i in range(len(table))}


def test_held_out_rows_stay_the_same_when_rows_are_added_and_moved(build, jsonl, pairs):
    rows = pairs(300)
    first = build(jsonl(rows[:200]), "first", eval_fraction=0.2)
    assert len(first.train) + len(first.evaluation) == 200 == first.report.kept
    assert 20 <= len(first.evaluation) <= 60
    assert first.report.evaluation_examples == len(first.evaluation)
    random.Random(1).shuffle(rows)
    second = build(jsonl([*rows, *rows[:20]]), "second", eval_fraction=0.2)
    assert digests(first.evaluation) < digests(second.evaluation)
    assert digests(first.train) < digests(second.train)
    assert not digests(second.train) & digests(second.evaluation)


def test_held_out_rows_are_drawn_by_cells_not_by_their_joined_ids():
    cells = [np.array(values, dtype=np.int32) for values in ([1], [2, 3], [1, 2], [3])]
    drawn = [share_of(cells[:2]), share_of(cells[2:]), share_of(cells[1::-1])]
    assert len(set(drawn)) == 3 and all(0 <= share < 1 for share in drawn)
    assert share_of(cells[:2]) == drawn[0]


def test_a_fraction_that_leaves_nothing_is_an_error(build, jsonl, pairs):
    with pytest.raises(DataError, match="eval_fraction 0.001 of 5 rows leaves none to evaluate on"):
        build(jsonl(pairs(5)), eval_fraction=0.001)
    with pytest.raises(DataError, match="eval_fraction 0.999 of 5 rows leaves none to train on"):
        build(jsonl(pairs(5)), eval_fraction=0.999)


def test_separate_evaluation_data(build, jsonl, pairs, tmp_path):
    train, test = jsonl(pairs(8), "d/train.jsonl"), jsonl(pairs(12)[8:], "d/test.jsonl")
    by_name = build(train, "by-name", eval_dataset_name=str(test))
    by_split = build(tmp_path / "d", "by-split", eval_split="test")
    for prepared in (by_name, by_split):
        assert (len(prepared.train), len(prepared.evaluation)) == (8, 4)
        assert prepared.report.rows == 8 and prepared.evaluation_report.rows == 4
        assert prepared.evaluation.origin(3).endswith("test.jsonl:4")
    assert by_name.evaluation.digest == by_split.evaluation.digest
    jsonl([{**STRINGS, "prompt": "x" * 100}], "d/train.jsonl")
    cut = build(train, "cut", eval_dataset_name=str(test))
    assert (cut.report.prompts_cut, cut.evaluation_report.prompts_cut) == (1, 0)
    jsonl([{**STRINGS, "chosen": ""}], "d/test.jsonl")
    with pytest.raises(DataError, match="test.jsonl: all 1 rows are bad"):
        build(train, "again", eval_dataset_name=str(test))
    assert not (tmp_path / "again").exists()


def inode(prepared: Prepared) -> int:
    return (prepared.train.folder / "ids.bin").stat().st_ino


def test_the_same_inputs_are_mapped_and_others_built(build, jsonl, pairs, make_tokenizer, tmp_path):
    rows = pairs(40)
    path = jsonl([*rows, {**STRINGS, "chosen": ""}])
    first = build(path, eval_fraction=0.2)
    kept = inode(first)
    again = build(path, eval_fraction=0.2)
    assert inode(again) == kept and again.report == first.report
    assert again.train.digest == first.train.digest
    assert again.evaluation.digest == first.evaluation.digest

    changes = [
        lambda: build(path, eval_fraction=0.3),
        lambda: build(path, eval_fraction=0.3, append_end_token=False),
        lambda: build(path, eval_fraction=0.3, template="Q: {prompt}"),
        lambda: build(jsonl([*rows[1:], {**STRINGS, "chosen": ""}]), eval_fraction=0.3),
        lambda: prepare_tables(
            PreferenceDatasetConfig(dataset_name=str(path)), make_tokenizer(), tmp_path / "tables"
        ),
        lambda: prepare_tables(
            PreferenceDatasetConfig(dataset_name=str(path)),
            make_tokenizer(begin=True),
            tmp_path / "tables",
        ),
    ]
    for change in changes:
        before, kept = kept, inode(change())
        assert kept != before
        assert inode(change()) == kept


@pytest.mark.parametrize("name", ["prepared.json", "train/ids.bin", "train/meta.json"])
def test_damaged_tables_are_built_again(name, build, jsonl, pairs, tmp_path):
    path = jsonl(pairs(5))
    digest = build(path).train.digest
    damaged = tmp_path / "tables" / name
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert build(path).train.digest == digest


def test_a_failure_keeps_the_previous_tables(build, jsonl, pairs):
    path = jsonl(pairs(5))
    digest = build(path).train.digest
    jsonl([*pairs(5), b"corrupt"])
    with pytest.raises(DataError, match=":6:1: corrupt JSON"):
        build(path)
    jsonl(pairs(5))
    assert build(path).train.digest == digest


def test_without_a_name_or_an_end_token(jsonl, pairs, make_tokenizer, tmp_path):
    with pytest.raises(UserError, match="dataset_name is missing"):
        prepare_tables(PreferenceDatasetConfig(), make_tokenizer(), tmp_path / "t")
    config = PreferenceDatasetConfig(dataset_name=str(jsonl(pairs(2))))
    with pytest.raises(UserError, match=r"no end token .*append_end_token: false"):
        prepare_tables(config, make_tokenizer(end=False), tmp_path / "t")


def test_sample_texts_are_those_of_good_rows(jsonl):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "c"}]
    other = [talk[0], {"role": "assistant", "content": "r"}]
    rows = [b"corrupt", {"chosen": talk, "rejected": talk}, {"chosen": talk, "rejected": other}]
    config = PreferenceDatasetConfig(dataset_name=str(jsonl(rows)))
    assert sample_texts(config) == ["q", "c", "r"]
    assert sample_texts(config, count=2) == []
