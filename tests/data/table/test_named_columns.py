"""`columns`: files whose columns have other names give the tables of files that have ours."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from modern_llm.config.data import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    MixtureSource,
    PreferenceDatasetConfig,
)
from modern_llm.config.errors import DataError
from modern_llm.data.encode.kinds import KINDS
from modern_llm.data.read.formats import INSTRUCTIONS, PREFERENCES
from modern_llm.data.table.build import prepare_tables, sample_texts

OURS = [
    {"prompt": f"How far is {at}? ", "chosen": f"{at} kilometres.", "rejected": "Not far."}
    for at in range(3, 9)
]
THEIRS = {"prompt": "question", "chosen": "best", "rejected": "worst"}
RENAMED = [{THEIRS[name]: value for name, value in row.items()} | {"id": 1} for row in OURS]
SWAPPED = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in OURS]
KIND_OF_FILE = {
    ".jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    ".parquet": lambda path, rows: pa.parquet.write_table(pa.Table.from_pylist(rows), path),
    ".csv": lambda path, rows: pa.csv.write_csv(pa.Table.from_pylist(rows), path),
}


@pytest.fixture
def built(tmp_path, tokenizer):
    """Return a function (rows, ending, **options) -> what `prepare_tables` makes of them."""

    def build(rows, ending=".jsonl", kind=PreferenceDatasetConfig, **options):
        file = tmp_path / f"rows{len(list(tmp_path.iterdir()))}{ending}"
        KIND_OF_FILE[ending](file, rows)
        config = kind(dataset_name=str(file), **options)
        return prepare_tables(config, tokenizer, tmp_path / f"of-{file.name}", max_length=64)

    return build


@pytest.mark.parametrize("ending", KIND_OF_FILE)
def test_pairs_under_other_names(built, ending):
    named = built(RENAMED, ending, columns=THEIRS)
    assert named.train.digest == built(OURS, ending).train.digest
    assert any("columns that are not read: 'id'" in note for note in named.report.notes)


def test_names_may_be_exchanged_and_hide_columns_of_the_file(built):
    exchanged = built(SWAPPED, columns={"chosen": "rejected", "rejected": "chosen"})
    assert exchanged.train.digest == built(OURS).train.digest
    rows = [row | {"prompt": "not this one"} for row in RENAMED]
    assert built(rows, columns=THEIRS).train.digest == built(OURS).train.digest


def test_instructions_and_documents(built):
    rows = [{"prompt": row["prompt"], "response": row["chosen"]} for row in OURS]
    other = [{"q": row["prompt"], "a": row["response"]} for row in rows]
    named = built(other, kind=InstructionDatasetConfig, columns={"prompt": "q", "response": "a"})
    assert named.train.digest == built(rows, kind=InstructionDatasetConfig).train.digest
    texts = [{"body": "The harbour was quiet in the morning. " * 9} for _ in range(4)]
    by_columns = built(texts, kind=DocumentDatasetConfig, columns={"text": "body"})
    by_option = built(texts, kind=DocumentDatasetConfig, text_column="body")
    assert by_columns.train.digest == by_option.train.digest


def test_each_source_of_a_mixture_and_the_evaluation_have_names(tmp_path, tokenizer):
    files = [tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"]
    for file, rows in zip(files, (OURS, RENAMED), strict=True):
        KIND_OF_FILE[".jsonl"](file, rows)
    sources = [
        MixtureSource(dataset_name=str(files[0])),
        MixtureSource(dataset_name=str(files[1]), columns=THEIRS),
    ]
    config = PreferenceDatasetConfig(sources=sources)
    mixed = prepare_tables(config, tokenizer, tmp_path / "mixed", max_length=64)
    assert len(mixed.train) == 2 * len(OURS)
    assert len(sample_texts(config)) == 2 * 3 * len(OURS)
    both = PreferenceDatasetConfig(
        dataset_name=str(files[1]), eval_dataset_name=str(files[1]), columns=THEIRS
    )
    found = prepare_tables(both, tokenizer, tmp_path / "both", max_length=64)
    assert found.evaluation is not None and len(found.evaluation) == len(OURS)


def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(built):
    with pytest.raises(DataError) as refusal:
        built(RENAMED, columns=THEIRS | {"prompt": "query"})
    assert "rows0.jsonl:1: columns reads prompt from 'query'; the row has only" in str(
        refusal.value
    )
    assert "['best', 'id', 'question', 'worst']" in str(refusal.value)


def test_a_null_under_another_name_is_a_null(built):
    rows = [*RENAMED, RENAMED[0] | {"best": None}]
    for ending in (".jsonl", ".parquet"):
        with pytest.raises(DataError, match="column 'chosen' is null"):
            built(rows, ending, columns=THEIRS)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        (PreferenceDatasetConfig, {"columns": {"promt": "q"}}, "no format reads a column 'promt'"),
        (DocumentDatasetConfig, {"columns": {"prompt": "q"}}, "those that are read: text"),
        (
            DocumentDatasetConfig,
            {"columns": {"text": "a"}, "text_column": "b"},
            "columns and text_column both name the documents",
        ),
        (
            PreferenceDatasetConfig,
            {"sources": [{"dataset_name": "d", "columns": {"x": "y"}}]},
            "sources: d: columns: no format reads a column 'x'",
        ),
    ],
)
def test_names_that_nothing_reads_are_refused(kind, options, reason):
    with pytest.raises(ValueError, match=reason):
        kind(**options)


def test_the_section_lists_every_column_that_a_format_is_known_by():
    listed = {kind.config: set(kind.config.read) for kind in KINDS}
    words = {
        kind: {w for row in formats for w in row.columns.replace(",", " ").split()}
        for kind, formats in (
            (PreferenceDatasetConfig, PREFERENCES),
            (InstructionDatasetConfig, INSTRUCTIONS),
        )
    }
    prose = {"optional", "as", "and", "or", "message", "lists", "transcripts"}
    for kind, names in words.items():
        assert names - prose <= listed[kind]
