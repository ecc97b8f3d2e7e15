"""Orders by length and by a column: pure functions of (seed, epoch, step)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.config.errors import DataError
from modern_llm.data.batch.order import Order
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table.build import prepare_tables

KEYS = np.array([5, 1, 3, 3, 9, 0, 2, 7, 3, 4, 8])


def steps(order: Order, epochs: int = 2) -> list[list[int]]:
    return [order.step(n).tolist() for n in range(order.steps_per_epoch * epochs)]


def test_a_column_is_sorted_from_the_lowest_up_in_every_epoch():
    order = Order(11, 4, seed=3, by="difficulty", keys=KEYS)
    for epoch in (steps(order)[:3], steps(order)[3:]):
        read = [index for step in epoch for index in step]
        assert KEYS[read].tolist() == sorted(KEYS) and sorted(read) == list(range(11))
    ties = [[i for s in steps(order)[n : n + 3] for i in s if KEYS[i] == 3] for n in (0, 3)]
    others = steps(Order(11, 4, seed=4, by="difficulty", keys=KEYS))
    assert ties[0] != ties[1] or ties[0] != [i for s in others[:3] for i in s if KEYS[i] == 3]


def test_length_keeps_similar_examples_together_and_shuffles_the_steps():
    keys = np.arange(100) % 37
    order = Order(100, 8, seed=1, by="length", keys=keys)
    first, second = steps(order)[:13], steps(order)[13:]
    for epoch in (first, second):
        assert sorted(i for step in epoch for i in step) == list(range(100))
        assert all(np.ptp(keys[step]) <= 4 for step in epoch)
        assert len(epoch[-1]) == 4 and keys[epoch[-1]].min() >= keys[epoch[0]].min()
        assert [keys[s].min() for s in epoch[:-1]] != sorted(keys[s].min() for s in epoch[:-1])
    assert first != second and steps(order) == steps(Order(100, 8, 1, by="length", keys=keys))


def test_left_out_rows_and_appended_rows_keep_the_order():
    order = Order(8, 3, seed=0, by="c", keys=KEYS, left_out=(1, 5), grown=((1, 11),))
    read = [i for n in range(5) for i in order.step(n).tolist()]
    assert KEYS[read[:6]].tolist() == sorted(KEYS[[0, 2, 3, 4, 6, 7]])
    assert KEYS[read[6:]].tolist() == sorted(KEYS[[0, 2, 3, 4, 6, 7, 8, 9, 10]])


def test_the_digest_names_the_order_and_random_has_the_one_of_before():
    digests = {Order(9, 3, 1, by=by).digest for by in ("random", "length", "a", "b")}
    assert len(digests) == 4 and Order(9, 3, 1).digest in digests


def rows(count):
    return [
        {"prompt": f"q {n}", "chosen": " y" * (1 + n % 5), "rejected": " n", "hard": -n % 7}
        for n in range(count)
    ]


def test_a_table_gives_the_keys(jsonl, tokenizer, tmp_path):
    path = jsonl(rows(12))

    def build(folder, **options):
        section = PreferenceDatasetConfig(dataset_name=str(path), **options)
        return prepare_tables(section, tokenizer, tmp_path / folder, max_length=64)

    assert build("random").order_keys() is None
    lengths = build("length", order="length")
    assert lengths.order_keys().tolist() == lengths.train.lengths.sum(axis=1).tolist()
    assert lengths.train.digest == build("random").train.digest
    column = build("column", order="hard")
    assert column.order_keys().tolist() == [-n % 7 for n in range(12)]
    assert column.train.values("weight").tolist() == [1] * 12
    with pytest.raises(DataError, match=r"rows.jsonl:1: column 'level' is missing"):
        build("none", order="level")
    with pytest.raises(DataError, match="no row has that column"):
        build("margin", order="margin").order_keys()


@pytest.mark.slow
def test_a_run_reads_its_pairs_in_that_order(tmp_path, tiny_checkpoint, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(12)))
    words = ["dpo", "--sft_checkpoint", str(tiny_checkpoint), "--data", str(data)]
    words += ["--train.run_name", "r", "--train.batch_size", "4", "--dpo.max_length", "32"]
    out = ["--train.output_dir", str(tmp_path / "run")]
    assert main([*words, *out, "--data.order", "hard", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    first = int(shown["first_example"].rpartition(":")[2]) - 1
    assert -first % 7 == 0
    assert main([*words, *out, "--data.order", "hard"]) == 0
    assert main([*words, *out, "--data.order", "length", "--train.epochs", "2"]) == 2
    assert "data.order" in capsys.readouterr().err
    grouped = ["--train.output_dir", str(tmp_path / "two"), "--dpo.group_by_prompt"]
    assert main([*words, *grouped, "--data.order", "length"]) == 2
    assert "both order the pairs" in capsys.readouterr().err
