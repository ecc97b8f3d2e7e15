"""Several sources in one run: weights by content, reports by source, exclusive options."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from modern_llm.config import DocumentDatasetConfig
from modern_llm.config.data import MixtureSource
from modern_llm.config.errors import DataError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.read import sources as sources_module
from modern_llm.data.table.build import prepare_tables


def built(folder, tokenizer, *sources, **options):
    config = PreferenceDatasetConfig(sources=[MixtureSource(**s) for s in sources], **options)
    return prepare_tables(config, tokenizer, folder, max_length=96)


def rows_of(table) -> Counter:
    return Counter(
        tuple(tuple(table.ids(i, c).tolist()) for c in table.columns) for i in range(len(table))
    )


@pytest.fixture
def two(jsonl, pairs):
    """Two files without common rows: 60 string pairs, 40 message pairs."""
    strings = jsonl(pairs(60), "strings.jsonl")
    messages = jsonl(
        [
            {
                "chosen": [
                    {"role": "user", "content": f"And number {i}?"},
                    {"role": "assistant", "content": f"Yes, {i}."},
                ],
                "rejected": [
                    {"role": "user", "content": f"And number {i}?"},
                    {"role": "assistant", "content": f"No, not {i}, never."},
                ],
            }
            for i in range(40)
        ],
        "messages.jsonl",
    )
    return str(strings), str(messages)


def test_weights_set_how_often_each_example_is_in_an_epoch(tmp_path, tokenizer, two):
    strings, messages = two
    alone = [
        built(tmp_path / n, tokenizer, {"dataset_name": f}) for n, f in zip("ab", two, strict=True)
    ]
    mixed = built(
        tmp_path / "mixed",
        tokenizer,
        {"dataset_name": strings, "weight": 2},
        {"dataset_name": messages, "weight": 0.5},
    )
    found = rows_of(mixed.train)
    first, second = (rows_of(a.train) for a in alone)
    assert {row: found[row] for row in first} == {row: 2 for row in first}
    halves = [found[row] for row in second]
    assert set(halves) == {0, 1} and 10 < sum(halves) < 30
    assert len(found) == 60 + sum(halves)
    assert [part.formats for part in mixed.parts] == [{"strings": 60}, {"messages": 40}]
    assert mixed.report.rows == 100 and mixed.report.kept == 100
    assert mixed.report.examples == len(mixed.train) == 120 + sum(halves)
    assert mixed.report.tokens == int(mixed.train.lengths.sum())
    assert any("weight 2" in line for line in mixed.lines())


def test_a_fractional_weight_keeps_its_rows_when_others_are_added(
    tmp_path, tokenizer, jsonl, pairs
):
    few, more = jsonl(pairs(30), "few.jsonl"), jsonl(pairs(50), "more.jsonl")
    tables = [
        built(tmp_path / str(n), tokenizer, {"dataset_name": str(file), "weight": 0.4})
        for n, file in enumerate((few, more))
    ]
    small, large = (set(rows_of(t.train)) for t in tables)
    assert small and small < large


def test_held_out_rows_count_once_and_are_not_trained_on(tmp_path, tokenizer, two):
    prepared = built(
        tmp_path / "held",
        tokenizer,
        {"dataset_name": two[0], "weight": 3},
        {"dataset_name": two[1]},
        eval_fraction=0.25,
    )
    train, evaluation = rows_of(prepared.train), rows_of(prepared.evaluation)
    assert set(evaluation.values()) == {1}
    assert not set(train) & set(evaluation)
    assert len(set(train)) + len(evaluation) == 100
    assert sum(p.evaluation_examples for p in prepared.parts) == len(prepared.evaluation)


def test_one_source_as_a_mixture_is_that_source(tmp_path, tokenizer, two):
    plain = prepare_tables(
        PreferenceDatasetConfig(dataset_name=two[0]), tokenizer, tmp_path / "plain", max_length=96
    )
    mixed = built(tmp_path / "mixed", tokenizer, {"dataset_name": two[0]})
    assert plain.train.digest == mixed.train.digest


def test_a_bad_source_is_named(tmp_path, tokenizer, two, jsonl):
    bad = jsonl([{"prompt": "a", "chosen": " ", "rejected": "b"}], "bad.jsonl")
    with pytest.raises(DataError, match="bad.jsonl: all 1 rows are bad"):
        built(tmp_path / "x", tokenizer, {"dataset_name": two[0]}, {"dataset_name": str(bad)})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dataset_name": "x"}, "sources and dataset_name exclude each other"),
        ({"split": "test"}, "sources and split exclude each other"),
        ({"eval_split": "test"}, "eval_split needs eval_dataset_name"),
        ({"sources": [{"dataset_name": "a", "format": "alpaca"}]}, "format 'alpaca' is none of"),
        ({"sources": [{"dataset_name": "a", "weight": 0}]}, "greater than 0"),
        ({"sources": []}, "at least 1"),
    ],
)
def test_contradictions_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        PreferenceDatasetConfig(**({"sources": [{"dataset_name": "a"}]} | options))


def test_documents_of_several_sources_fill_rows_together(tmp_path, tokenizer, jsonl):
    files = [
        jsonl([{"text": f"{name} {i} " * 9} for i in range(15)], f"{name}.jsonl") for name in "ab"
    ]
    config = DocumentDatasetConfig(sources=[{"dataset_name": str(f)} for f in files])
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=64)
    ids = np.concatenate([prepared.train.ids(i, "text") for i in range(len(prepared.train))])
    whole = []
    for name in "ab":
        for i in range(15):
            whole += tokenizer(f"{name} {i} " * 9)["input_ids"] + [tokenizer.eos_token_id]
    assert ids.tolist() == whole[: len(ids)] and len(whole) - len(ids) < 64
    assert prepared.report.tokens_cut == len(whole) - len(ids)


def test_a_streamed_source_is_read_row_by_row_up_to_max_examples(tmp_path, tokenizer, monkeypatch):
    """An endless generator replaces the stream of the library."""
    import datasets

    seen = []

    def rows():
        for i in range(10**9):
            seen.append(i)
            yield {"text": f"Document {i} of a long stream. " * 3}

    def load(name, subset, *, split, streaming):
        assert (name, split, streaming) == ("owner/endless", "train", True)
        return datasets.IterableDataset.from_generator(rows)

    class Info:
        sha = "abc123"

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: Info)
    config = DocumentDatasetConfig(dataset_name="owner/endless", streaming=True, max_examples=40)
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=64)
    assert prepared.report.rows == 40 and max(seen) <= 40
    assert prepared.train.origin(0) == "owner/endless/train:[0]"
    source = sources_module.open_source("owner/endless", text_column="text", streaming=True)
    assert source.identity == ["owner/endless/train abc123"]


def test_an_interrupted_stream_is_named(monkeypatch):
    import datasets

    def rows():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(rows)
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda self, name: type("I", (), {"sha": None})
    )
    source = sources_module.open_source("owner/name", text_column="text", streaming=True)
    with pytest.raises(DataError, match="owner/name: the stream broke off .*reset by peer"):
        list(source)
