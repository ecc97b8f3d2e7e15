"""Rows of several judged responses: as the best pair, as all pairs, and as rankings."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig
from modern_llm.config.errors import DataError
from modern_llm.data.read.records import LEVELS
from modern_llm.data.table.build import prepare_tables
from tests.helpers.text import write_jsonl

PROMPT = "say a word:"
LISTED = [
    {"prompt": PROMPT, "responses": [" dog", " cat", " the bird", " a"], "scores": [2, 9, 5, 2]},
    {"prompt": "two:", "responses": [" red", " blue"], "ranks": [2, 1]},
]
ULTRAFEEDBACK = {
    "instruction": "say a word",
    "completions": [
        {"response": f"word {score} {at}", "overall_score": score}
        for at, score in enumerate((7.5, 3.0, 9.0, 7.5))
    ],
}
NECTAR = {
    "prompt": "\n\nHuman: a word?\n\nAssistant:",
    "answers": [{"answer": f" word {rank}", "rank": rank} for rank in (3, 1, 2)],
}


@pytest.fixture
def build(tmp_path, tiny_tokenizer):
    def build(rows, name="data", **options):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        config = PreferenceDatasetConfig(dataset_name=str(path), **options)
        tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
        return prepare_tables(config, tokenizer, tmp_path / f"{name}-tables", max_length=64)

    return build


@pytest.fixture
def words(tiny_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    return lambda table, row, column: tokenizer.decode(
        table.ids(row, column), skip_special_tokens=True
    )


def test_a_ranking_is_one_row_from_the_best_response_to_the_worst(build, words):
    prepared = build(LISTED, rankings="whole")
    table = prepared.train
    found = [words(table, 0, f"response_{n}") for n in range(1, 6)]
    assert found == [" cat", " the bird", " dog", " a", ""]
    assert table.levels[0].tolist() == [0, 1, 2, 2] + [-1] * 12
    assert [words(table, 1, f"response_{n}") for n in (1, 2)] == [" blue", " red"]
    assert table.levels[1].tolist() == [0, 1] + [-1] * 14
    assert any("responses of 2 rows: 2 to 4, mean 3" in line for line in prepared.lines())
    assert any("tied responses of 2 rows: 0 to 2" in line for line in prepared.lines())


def test_all_pairs_leave_out_ties_and_stay_on_one_side(build, words):
    prepared = build(LISTED, rankings="all_pairs")
    table = prepared.train
    assert table.columns == ("prompt", "chosen", "rejected") and table.levels is None
    pairs = [
        (words(table, row, "chosen"), words(table, row, "rejected")) for row in range(len(table))
    ]
    assert pairs == [
        (" cat", " the bird"), (" cat", " dog"), (" cat", " a"),
        (" the bird", " dog"), (" the bird", " a"), (" blue", " red"),
    ]  # fmt: skip
    rows = [LISTED[0] | {"prompt": f"say {n}:"} for n in range(30)]
    held = build(rows, "held", rankings="all_pairs", eval_fraction=0.4)
    sides = [
        {table.ids(row, "prompt").tobytes() for row in range(len(table))}
        for table in (held.train, held.evaluation)
    ]
    assert all(sides) and not sides[0] & sides[1]


def test_the_best_and_the_worst_are_the_default(build, words):
    table = build(LISTED).train
    assert (words(table, 0, "chosen"), words(table, 0, "rejected")) == (" cat", " a")
    assert (words(table, 1, "chosen"), words(table, 1, "rejected")) == (" blue", " red")


@pytest.mark.parametrize(
    ("row", "levels"),
    [(ULTRAFEEDBACK, [0, 1, 1, 2]), (NECTAR, [0, 1, 2])],
    ids=["ultrafeedback", "nectar"],
)
def test_published_shapes_are_read_whole(row, levels, build, words):
    prepared = build([row] * 3, rankings="whole")
    table = prepared.train
    assert table.levels[0][: len(levels)].tolist() == levels
    assert (table.levels[0][len(levels) :] == -1).all()
    assert "word 9.0" in words(table, 0, "response_1") or " word 1" in words(table, 0, "response_1")
    pairs = build([row] * 3, "pairs", rankings="all_pairs").train
    compared = sum(a < b for at, a in enumerate(levels) for b in levels[at:])
    assert len(pairs) == 3 * compared


def test_pairs_are_rankings_of_two_with_the_same_ids(build, pairs):
    rows = [row | {"weight": 2.0} for row in pairs(5)]
    ranked, plain = build(rows, "a", rankings="whole").train, build(rows, "b").train
    for row in range(5):
        for one, other in (("prompt",) * 2, ("response_1", "chosen"), ("response_2", "rejected")):
            assert np.array_equal(ranked.ids(row, one), plain.ids(row, other))
    assert ranked.values("weight").tolist() == [2.0] * 5
    assert (ranked.levels[:, :3] == [0, 1, -1]).all()


def test_equal_responses_count_once_and_messages_are_read(build, words):
    row = {
        "prompt": [{"role": "user", "content": "a word?"}],
        "responses": [" dog", {"role": "assistant", "content": "cat"}, " dog"],
        "scores": [1, 3, 2],
    }
    table = build([row, row], rankings="whole").train
    assert table.levels[0][:3].tolist() == [0, 1, -1]
    assert "cat" in words(table, 0, "response_1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"responses": [" a"], "scores": [1]}, "a ranking of 1 response"),
        ({"responses": [f" {n}" for n in range(17)], "scores": [*range(17)]}, "at most 16"),
        ({"scores": [1, 2]}, "no list of 4 numbers"),
        ({"scores": [1, 2, "x", 3]}, "expected a number"),
        ({"scores": [1, 2, True, 3]}, "expected a number"),
        ({"responses": [" a", 3, " b", " c"]}, "column 'responses', 1 is"),
    ],
)
@pytest.mark.parametrize("rankings", ["best_worst", "whole"])
def test_broken_rankings_are_refused_with_their_line(change, reason, rankings, build):
    with pytest.raises(DataError, match=rf"data.jsonl:3: .*{reason}"):
        build([*LISTED, LISTED[0] | change], rankings=rankings)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ULTRAFEEDBACK | {"completions": ULTRAFEEDBACK["completions"][:1]}, "ultrafeedback"),
        (NECTAR | {"answers": NECTAR["answers"][:1]}, "nectar"),
    ],
)
def test_one_response_in_a_published_shape_is_refused_with_its_line(row, name, build):
    with pytest.raises(DataError, match=r"data.jsonl:2: a ranking of 1 response"):
        build([ULTRAFEEDBACK if name == "ultrafeedback" else NECTAR, row], rankings="whole")


def test_responses_without_a_score_are_left_out(build):
    some = [dict(item) for item in ULTRAFEEDBACK["completions"]]
    some[0]["overall_score"] = some[1]["overall_score"] = None
    few = [{**item, "overall_score": None} for item in some[:3]] + some[3:]
    rows = [ULTRAFEEDBACK | {"completions": some}] * 20 + [ULTRAFEEDBACK | {"completions": few}]
    prepared = build(rows, rankings="whole")
    assert prepared.report.drops == {"fewer than two judged responses": 1}
    assert (prepared.train.levels >= 0).sum(1).tolist() == [2] * 20


def test_equal_scores_alone_are_dropped(build):
    rows = [*LISTED * 20, LISTED[0] | {"scores": [1, 1, 1, 1]}]
    prepared = build(rows, rankings="whole")
    assert prepared.report.drops == {"no preference": 1} and len(prepared.train) == 40


def test_inspect_counts_and_writes_rankings(tmp_path, tiny_tokenizer, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", LISTED * 3)
    config = write_jsonl(
        tmp_path / "run.json",
        [{
            "sft_checkpoint": str(tiny_tokenizer),
            "tokenizer_name": str(tiny_tokenizer),
            "dpo": {"loss_type": "plackett_luce", "max_length": 64},
            "data": {"dataset_name": str(data), "rankings": "whole"},
            "train": {"run_name": "x", "batch_size": 2, "output_dir": str(tmp_path)},
        }],
    )  # fmt: skip
    tokens = tmp_path / "tokens.jsonl"
    assert main(["inspect", "--config", str(config), "--tokens", str(tokens), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (source,) = result["sources"]
    assert source["values"]["responses"] == {"rows": 6, "sum": 18, "min": 2, "max": 4}
    assert source["values"]["tied responses"]["sum"] == 6
    assert list(source["lengths"]) == ["prompt", *(f"response_{n}" for n in range(1, 5))]
    assert not any("end token" in warning["message"] for warning in result["warnings"])
    lines = [json.loads(line) for line in tokens.read_text().splitlines()]
    assert "response_4_ids" in lines[0] and "response_3_ids" not in lines[1]
    assert [lines[0][name] for name in LEVELS[:5]] == [0, 1, 2, 2, -1]
    assert main(["inspect", "--config", str(config)]) == 0
