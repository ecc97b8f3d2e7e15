"""Weights and margins of pairs: read, checked, kept in the table, part of its identity."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modern_llm.config.errors import DataError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table.build import prepare_tables
from modern_llm.data.table.token_table import TokenTable
from modern_llm.reference.keys import entry_key


@pytest.fixture
def build(tmp_path, tokenizer):
    def make(path, folder="tables", **options):
        config = PreferenceDatasetConfig(dataset_name=str(path), **options)
        return prepare_tables(config, tokenizer, tmp_path / folder, max_length=64)

    return make


def numbered(rows, **columns):
    """The rows with one value of each column; None leaves it out."""
    return [
        row | {name: values[at] for name, values in columns.items() if values[at] is not None}
        for at, row in enumerate(rows)
    ]


def test_weights_and_margins_follow_their_rows(build, jsonl, pairs):
    weights = [0.5, 2, 1, 0, 3.25]
    rows = numbered(pairs(5), weight=weights, margin=[0, 1, 2, 3, 4])
    prepared = build(jsonl(rows))
    table = prepared.train
    assert table.values("weight").tolist() == weights
    assert table.values("margin").tolist() == [0, 1, 2, 3, 4]
    part = table.select([4, 1])
    assert part.values("weight").tolist() == [3.25, 2]
    assert part.select([1]).values("margin").tolist() == [1]
    assert any("weight of 5 rows: 0 to 3.25, mean 1.35" in note for note in prepared.lines())
    again = build(jsonl(rows, "copy.jsonl"), "again", eval_fraction=0.5)
    both = [*again.train.values("weight"), *again.evaluation.values("weight")]
    assert sorted(both) == sorted(weights)


def test_they_are_part_of_the_identity_of_the_table_and_not_of_the_reference_keys(
    build, jsonl, pairs
):
    plain = build(jsonl(pairs(5)), "plain").train
    assert plain.values("weight") is None and not list(plain.folder.glob("values.bin"))
    assert "values" not in json.loads((plain.folder / "meta.json").read_text())
    tables = {}
    for name, weights in {"a": [1, 1, 1, 1, 1], "b": [1, 1, 2, 1, 1]}.items():
        tables[name] = build(jsonl(numbered(pairs(5), weight=weights), f"{name}.jsonl"), name).train
    a, b = tables["a"], tables["b"]
    assert len({plain.digest, a.digest, b.digest}) == 3
    assert a.first_difference(b) == 2 and a.first_difference(a.select(range(3))) == 3
    assert a.select(range(5)).digest == a.digest
    assert a.select([0, 1]).digest == b.select([0, 1]).digest != plain.select([0, 1]).digest
    assert answer_keys_of(a) == answer_keys_of(b) == answer_keys_of(plain)
    read = build(jsonl(numbered(pairs(5), weight=[2] * 5), "c.jsonl"), "c", pair_values=[])
    assert read.train.digest == plain.digest
    assert any("not read: 'weight'" in note for note in read.report.notes)


def answer_keys_of(table: TokenTable) -> list[bytes]:
    return [
        entry_key(table.ids(i, "prompt"), table.ids(i, name))
        for i in range(len(table))
        for name in ("chosen", "rejected")
    ]


def test_a_source_without_them_has_the_defaults(tmp_path, build, jsonl, pairs, tokenizer):
    one = jsonl(numbered(pairs(3), weight=[2, 3, 4]), "one.jsonl")
    other = jsonl(pairs(6)[3:], "other.jsonl")
    config = PreferenceDatasetConfig(
        sources=[{"dataset_name": str(other)}, {"dataset_name": str(one)}]
    )
    table = prepare_tables(config, tokenizer, tmp_path / "mixed", max_length=64).train
    assert table.values("weight").tolist() == [1, 1, 1, 2, 3, 4]
    assert table.values("margin").tolist() == [0] * 6


@pytest.mark.parametrize(
    ("values", "place", "fragment"),
    [
        ([1, -0.5, 1], "rows.jsonl:2", "'weight' is -0.5, expected a number of at least 0"),
        ([1, 1, "much"], "rows.jsonl:3", "'weight' is 'much'"),
        ([True, 1, 1], "rows.jsonl:1", "'weight' is True"),
        ([1, [2], 1], "rows.jsonl:2", "'weight' is a list"),
        ([1, None, 1], "rows.jsonl:2", "'weight' is missing"),
        ([None, None, 1], "rows.jsonl:3", "is missing in the rows before"),
    ],
)
def test_a_bad_number_is_a_fault_of_structure(build, jsonl, pairs, values, place, fragment):
    path = jsonl(numbered(pairs(3), weight=values))
    with pytest.raises(DataError, match=place) as error:
        build(path)
    assert fragment in str(error.value)
    kept = build(path, "skipped", on_bad_row="skip", max_dropped=1.0)
    assert len(kept.train) == 2


def test_every_type_of_file_gives_the_same_numbers(tmp_path, build, pairs):
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = numbered(pairs(4), weight=[0.25, 1, 3, 0], margin=[1.5, 0, 2, 1])
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    digests = {build(tmp_path / f"a.{s}", s).train.digest for s in ("jsonl", "parquet", "csv")}
    assert len(digests) == 1


def test_another_name_by_columns(build, jsonl, pairs):
    rows = [row | {"trust": at + 1} for at, row in enumerate(pairs(3))]
    table = build(jsonl(rows), columns={"weight": "trust"}).train
    np.testing.assert_array_equal(table.values("weight"), [1, 2, 3])


def test_tokens_of_inspect_hold_them(tmp_path, jsonl, pairs, tokenizer, capsys):
    from modern_llm.cli import main

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = numbered(pairs(3), weight=[1, 0.5, 2], margin=[0, 1, 0.25])
    out = tmp_path / "tokens.jsonl"
    words = ["--data", str(jsonl(rows)), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main(["inspect", *words, "--tokens", str(out), "--json"]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(e["weight"], e["margin"]) for e in lines] == [(1, 0), (0.5, 1), (2, 0.25)]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["sources"][0]["values"]["weight"] == {"rows": 3, "sum": 3.5, "min": 0.5, "max": 2}
