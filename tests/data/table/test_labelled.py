"""Labelled responses: read in every form, pairs as two of them, bad labels refused."""

from __future__ import annotations

import numpy as np
import pytest

from modern_llm.config import LabelledDatasetConfig, PreferenceDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.table.build import prepare_tables

TURNS = [{"role": "user", "content": "Why is the sky blue?"}]
ANSWER = [{"role": "assistant", "content": "Light is scattered."}]
ROWS = [
    {"prompt": "Name a river.", "completion": " The Rhine.", "label": True},
    {"prompt": "Name a tree.", "completion": " Water.", "label": False},
    {"prompt": "Name a bird.", "completion": " A wren.", "label": True},
]


@pytest.fixture
def build(tmp_path, tokenizer):
    def make(path, folder="tables", section=LabelledDatasetConfig, **options):
        config = section(dataset_name=str(path), **options)
        return prepare_tables(config, tokenizer, tmp_path / folder, max_length=64)

    return make


def rows_of(table):
    """(prompt, response, label) of every row."""
    return [
        (table.ids(i, "prompt").tolist(), table.ids(i, "response").tolist(), label)
        for i, label in enumerate(table.values("label"))
    ]


def test_strings_are_read_with_their_labels(build, jsonl):
    prepared = build(jsonl(ROWS))
    assert prepared.train.columns == ("prompt", "response")
    assert prepared.train.values("label").tolist() == [1, 0, 1]
    assert any("2 desirable, 1 undesirable rows" in line for line in prepared.lines())
    renamed = [
        {"prompt": r["prompt"], "response": r["completion"], "label": r["label"]} for r in ROWS
    ]
    assert rows_of(build(jsonl(renamed, "r.jsonl"), "r").train) == rows_of(prepared.train)
    mapped = [{"q": r["prompt"], "a": r["completion"], "good": r["label"]} for r in ROWS]
    columns = {"prompt": "q", "completion": "a", "label": "good"}
    found = build(jsonl(mapped, "m.jsonl"), "m", columns=columns).train
    assert rows_of(found) == rows_of(prepared.train)


def test_a_csv_file_has_its_labels_as_words(build, tmp_path):
    path = tmp_path / "rows.csv"
    lines = [f"{r['prompt']},{r['completion']},{r['label']}" for r in ROWS]
    path.write_text("\n".join(["prompt,completion,label", *lines]) + "\n")
    assert build(path).train.values("label").tolist() == [1, 0, 1]


def test_messages_are_read_in_both_forms(build, jsonl):
    split = [{"prompt": TURNS, "completion": ANSWER, "label": good} for good in (True, False)]
    whole = [{"messages": TURNS + ANSWER, "label": good} for good in (True, False)]
    a = build(jsonl(split), "a")
    b = build(jsonl(whole, "whole.jsonl"), "b")
    assert rows_of(a.train) == rows_of(b.train)
    assert a.train.values("label").tolist() == [1, 0]
    assert a.report.formats == {"labelled_messages": 2}


def test_a_pair_is_a_desirable_and_an_undesirable_row_with_the_ids_of_dpo(build, jsonl, pairs):
    path = jsonl(pairs(4))
    dpo = build(path, "dpo", PreferenceDatasetConfig).train
    prepared = build(path, "kto")
    table = prepared.train
    assert len(table) == 8 and prepared.report.rows == prepared.report.kept == 8
    assert table.values("label").tolist() == [1, 0] * 4
    for row in range(8):
        pair, side = divmod(row, 2)
        assert np.array_equal(table.ids(row, "prompt"), dpo.ids(pair, "prompt"))
        assert np.array_equal(
            table.ids(row, "response"), dpo.ids(pair, ("chosen", "rejected")[side])
        )
        assert table.origin(row) == dpo.origin(pair)


def test_both_responses_of_a_pair_are_held_out_together(build, jsonl, pairs):
    prepared = build(jsonl(pairs(40)), eval_fraction=0.4)
    prompts = [
        {table.ids(i, "prompt").tobytes() for i in range(len(table))}
        for table in (prepared.train, prepared.evaluation)
    ]
    assert all(prompts) and not prompts[0] & prompts[1]
    assert prepared.report.evaluation_examples == len(prepared.evaluation)


@pytest.mark.parametrize("label", [1, 0, "good", "1", None, 0.5])
def test_a_label_that_is_not_true_or_false_is_refused_with_its_line(build, jsonl, label):
    path = jsonl([*ROWS, ROWS[0] | {"label": label}])
    with pytest.raises(DataError, match=rf"{path.name}:4: column 'label' is "):
        build(path)
    kept = build(path, on_bad_row="skip", max_dropped=1.0)
    assert len(kept.train) == 3


def test_missing_columns_are_named(build, jsonl):
    bare = [{name: row[name] for name in ("prompt", "completion")} for row in ROWS]
    with pytest.raises(DataError, match="labelled.*label.*as instructions they are strings"):
        build(jsonl(bare))
    with pytest.raises(DataError, match="as labelled they are strings.*verb kto"):
        build(jsonl(ROWS, "rows.jsonl"), section=PreferenceDatasetConfig)


def test_an_order_column_is_read_beside_the_label(build, jsonl):
    rows = [row | {"level": at} for at, row in enumerate(ROWS)]
    table = build(jsonl(rows), order="level").train
    assert table.values("level").tolist() == [0, 1, 2]
    assert table.values("label").tolist() == [1, 0, 1]


def test_what_inspect_writes_is_read_back_as_the_same_rows(
    build, jsonl, pairs, tmp_path, tokenizer
):
    from modern_llm.data.encode.pipeline import recipe_of
    from modern_llm.data.inspect.statistics import examine
    from modern_llm.data.inspect.token_lines import token_lines

    path = jsonl(pairs(6))
    recipe = recipe_of(LabelledDatasetConfig(dataset_name=str(path)), tokenizer, 64)
    with token_lines(tmp_path / "ids.jsonl", recipe) as sink:
        examine(LabelledDatasetConfig(dataset_name=str(path)), recipe, sink=sink)
    again = build(tmp_path / "ids.jsonl", "ids")
    assert again.report.formats == {"labelled_token_ids": 12}
    assert again.train.digest == build(path, "texts").train.digest


@pytest.fixture
def _own_formats_removed():
    from modern_llm.data.read.labelled import OWN_LABELLED

    yield
    OWN_LABELLED.clear()
    LabelledDatasetConfig.formats.remove("thumbs")


def test_a_format_of_a_user_gives_labelled_rows(build, jsonl, _own_formats_removed):
    from modern_llm import register_format

    def thumbs(row):
        return {"prompt": row["q"], "completion": row["a"], "label": row["thumb"] == "up"}

    register_format("thumbs", thumbs, columns=["q", "a", "thumb"], kind="labelled")
    rows = [{"q": r["prompt"], "a": r["completion"], "thumb": "down"} for r in ROWS]
    rows[0]["thumb"] = "up"
    prepared = build(jsonl(rows), format="thumbs")
    assert prepared.train.values("label").tolist() == [1, 0, 0]
