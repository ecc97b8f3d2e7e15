"""Documents are packed into full rows; their starts are stored, and no token is lost or doubled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from modern_llm.config.data import DocumentDatasetConfig
from modern_llm.config.errors import DataError, UserError
from modern_llm.data.encode.pipeline import RowPacker
from modern_llm.data.table.build import prepare_tables


class Written(list):
    """Receives the rows of a packer."""

    def add(self, cells, origin):
        self.append(([cell.tolist() for cell in cells], origin))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 12), max_size=12), st.integers(2, 7))
def test_any_documents_fill_rows_in_order(lengths, row_length):
    written = Written()
    packer = RowPacker(written, row_length)
    stream: list[tuple[int, int]] = []
    for document, length in enumerate(lengths):
        packer.add([np.arange(length) + 100 * document], f"f:{document}")
        stream += [(document, document * 100 + i) for i in range(length)]
    full = len(stream) // row_length
    assert len(written) == full and packer.leftover == len(stream) - full * row_length
    for number, ((ids, starts), origin) in enumerate(written):
        part = stream[number * row_length : (number + 1) * row_length]
        assert ids == [token for _, token in part]
        documents = [document for document, _ in part]
        begins = [i for i in range(row_length) if i == 0 or documents[i] != documents[i - 1]]
        assert starts == begins and origin == f"f:{documents[0]}"


def build(path: Path, tokenizer, row_length: int = 8, **options):
    config = DocumentDatasetConfig(dataset_name=str(path), **options)
    return prepare_tables(config, tokenizer, path.parent / "tables", max_length=row_length)


@pytest.mark.parametrize("begin", [False, True])
def test_documents_follow_one_another_with_end_tokens(begin, jsonl, make_tokenizer):
    tokenizer = make_tokenizer(begin=begin)
    texts = ["The harbour was quiet.", " Boats\n", "x", "mix flour and water; wait"]
    prepared = build(jsonl({"text": text} for text in texts), tokenizer)
    table = prepared.train
    assert table.columns == ("text", "starts")
    assert (table.lengths[:, 0] == 8).all()
    stream = "".join(tokenizer.decode(table.ids(i, "text")) for i in range(len(table)))
    lead = "<|begin|>" if begin else ""
    whole = "".join(f"{lead}{text}<|end|>" for text in texts)
    assert whole.startswith(stream)
    left = len(tokenizer(whole.removeprefix(stream), add_special_tokens=False)["input_ids"])
    report = prepared.report
    assert report.tokens_cut == left < 8
    assert report.tokens == table.lengths[:, 0].sum() == 8 * report.examples
    assert (report.rows, report.kept, report.formats) == (4, 4, {"text": 4})
    end = tokenizer.eos_token_id
    for i in range(len(table)):
        ids, starts = table.ids(i, "text"), table.ids(i, "starts")
        after_end = np.flatnonzero(ids[:-1] == end) + 1
        assert starts.tolist() == [0, *after_end.tolist()]


def test_empty_documents_are_counted_but_do_not_count_as_dropped(jsonl, tokenizer, tmp_path):
    rows = [{"text": "The harbour was quiet in the morning."}, {"text": ""}, {"text": " \n"}] * 4
    prepared = build(jsonl(rows), tokenizer)
    assert prepared.report.drops == {"empty document": 8} and prepared.report.kept == 4
    with pytest.raises(DataError, match="all 2 rows are bad: 2 empty document"):
        build(jsonl(rows[1:3]), tokenizer)


def test_fewer_tokens_than_a_row_are_refused(jsonl, tokenizer, tmp_path):
    path = jsonl([{"text": "x"}, {"text": "y"}])
    with pytest.raises(DataError, match="has 4 tokens to train on, fewer than one row of 8"):
        build(path, tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(build(path, tokenizer, row_length=4).train) == 1
    with pytest.raises(UserError, match="row_length 1 "):
        build(path, tokenizer, row_length=1)


def test_a_tokenizer_without_an_end_token_is_refused(jsonl, make_tokenizer):
    with pytest.raises(UserError, match="no end token .* to stand between documents"):
        build(jsonl([{"text": "x"}]), make_tokenizer(end=False))


def test_columns_and_text_files(tmp_path, jsonl, tokenizer):
    other = build(jsonl([{"body": "x" * 20, "text": 1}]), tokenizer, text_column="body").train
    (tmp_path / "a.txt").write_text("x" * 20 + "\n")
    plain = build(tmp_path / "a.txt", tokenizer, text_column="body").train
    assert plain.digest == other.digest and plain.origin(0) == f"{tmp_path}/a.txt:1"
    with pytest.raises(DataError, match=":1: column 'words' is missing; the row has"):
        build(jsonl([{"body": "x", "text": "y"}]), tokenizer, text_column="words")


def test_whole_documents_are_held_out(jsonl, tokenizer):
    rows = [{"text": f"Boat number {i} came in after another one."} for i in range(60)]
    prepared = build(jsonl(rows), tokenizer, eval_fraction=0.3)

    def numbers(table) -> set[str]:
        text = "".join(tokenizer.decode(table.ids(i, "text")) for i in range(len(table)))
        return {
            part.split()[2] for part in text.split("<|end|>") if part.startswith("Boat number ")
        }

    trained, held_out = numbers(prepared.train), numbers(prepared.evaluation)
    assert not trained & held_out and len(trained | held_out) >= 55 and len(held_out) >= 6


def test_wiki_sample(shared: Path, tmp_path: Path):
    source = shared / "data" / "wiki_sample.txt"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    config = DocumentDatasetConfig(dataset_name=str(source))
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=1024)
    table = prepared.train
    lines = source.read_text(encoding="utf-8").splitlines()
    assert prepared.report.rows == len(lines)
    text = tokenizer.decode(np.concatenate([table.ids(i, "text") for i in range(len(table))]))
    assert "<|endoftext|>".join(lines).startswith(text[:200_000])
    assert prepared.report.tokens_cut < 1024
    begun = sum(int((table.ids(i, "starts") > 0).sum()) for i in range(len(table)))
    assert len(lines) - 2 <= begun <= len(lines) - 1
