"""The statistics of `inspect`, each compared with what was put into the data."""

from __future__ import annotations

import numpy as np
import pytest

from modern_llm.config import InstructionDatasetConfig
from modern_llm.config.data import DocumentDatasetConfig, PreferenceDatasetConfig
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.inspect.result import inspection
from modern_llm.data.inspect.statistics import examine, summary_of
from modern_llm.data.inspect.warnings import Setup
from modern_llm.data.table.build import prepare_tables

PAIR = ("prompt", "chosen", "rejected")


@pytest.fixture
def look(tokenizer):
    """Inspect a section with the plain tokenizer."""

    def run(config, kind="preferences", length=512, batch=4, budget=(), **options):
        recipe = recipe_of(config, tokenizer, length)
        setup = Setup(kind, length, batch, config.max_dropped, config.on_bad_row, *budget)
        return inspection(examine(config, recipe, **options), setup, tokenizer)

    return run


def row(i, prompt="How far is {}?", chosen=" {} miles.", rejected=" Guess {}."):
    return dict(zip(PAIR, (t.format(i) for t in (prompt, chosen, rejected)), strict=True))


def settings_of(result):
    return [w["setting"] for w in result["warnings"]]


def test_rows_above_the_budget_name_what_makes_them_fit(look, jsonl):
    rows = [row(i) for i in range(9)] + [row(9, prompt="far " * 300)]
    config = PreferenceDatasetConfig(dataset_name=str(jsonl(rows)))
    assert not any("sequence" in setting for setting in settings_of(look(config, length=4096)))
    result = look(config, length=4096, budget=(100,))
    lengths = result["sources"][0]["lengths"]
    longest = sum(lengths[name]["max"] for name in PAIR) + 2  # and the two end tokens
    (found,) = [w for w in result["warnings"] if "sequence_parallel" in w["setting"]]
    assert "10.0% of the rows have more tokens than the 100 of train.tokens" in found["message"]
    assert "the run would stop" in found["message"]
    assert f"tokens_per_micro_batch {longest}, gradient_checkpointing true" in found["message"]
    parts = int(found["setting"].rpartition(" ")[2])
    assert parts & (parts - 1) == 0 and 100 * parts >= longest > 100 * parts // 2
    # Two processes that share rows already: fewer rows are above, the advice is the same.
    (both,) = [
        w for w in look(config, length=4096, budget=(100, 2))["warnings"] if "seq" in w["setting"]
    ]
    assert both["setting"] == found["setting"] and "than the 200 of" in both["message"]
    assert not any(
        "seq" in w["setting"] for w in look(config, length=4096, budget=(100, 4))["warnings"]
    )
    long = [row(i, prompt="far " * 19_000) for i in range(4)]
    config = PreferenceDatasetConfig(dataset_name=str(jsonl(long)))
    (found,) = [w for w in look(config, length=40_000)["warnings"] if "sequence" in w["setting"]]
    assert "100.0% of the rows" in found["message"] and "by default" in found["message"]


def test_planted_faults_are_found(look, jsonl, tokenizer):
    rows = [row(i) for i in range(40)]
    rows += [row(3)] * 4  # repeated
    rows += [row(5, chosen=" Guess {}.", rejected=" {} miles.")]  # contradicts row 5
    rows += [row(50, chosen="  "), row(51, rejected=" 51 miles.")]  # empty, equal
    rows += [row(60, prompt="")]
    rows[0] |= {"score_chosen": 4.0, "score_rejected": 4.0}
    rows[1] |= {"score_chosen": 4.0, "score_rejected": 1.0}
    lines = [*rows, b'{"prompt": "x", "chosen": 3', {"prompt": "p", "chosen": 1, "rejected": "r"}]
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(lines))))
    (source,) = result["sources"]
    assert (result["rows"], result["kept"], result["dropped"]) == (50, 46, 4)
    assert result["formats"] == {"strings": 46}
    assert "prompt" in source["why"] and source["format"] == "strings"
    assert source["drops"] == {
        "broken structure": 2, "empty response": 1, "equal responses": 1
    }  # fmt: skip
    assert (source["equal_pairs"], source["empty_fields"], source["empty_prompts"]) == (1, 1, 1)
    assert source["duplicate_rows"] == 4
    assert source["duplicate_prompts"] == 5
    assert source["contradicting_rows"] == 2
    assert source["score_ties"] == 1
    prompts = [len(tokenizer(r["prompt"])["input_ids"]) for r in rows if r["chosen"].strip()]
    assert source["lengths"]["prompt"]["max"] == max(prompts)
    assert result["steps_per_epoch"] == 12
    assert "data.on_bad_row" in settings_of(result)
    assert "dpo.label_smoothing" in settings_of(result)


def test_token_counts_are_those_of_training(look, jsonl, tokenizer, tmp_path):
    rows = [
        row(i, prompt=f"Why {i}? " * (1 + i % 9), chosen=" So. " * (1 + i % 30)) for i in range(80)
    ]
    config = PreferenceDatasetConfig(dataset_name=str(jsonl(rows)))
    result = look(config, length=40)
    table = prepare_tables(config, tokenizer, tmp_path / "t", max_length=40)
    (source,) = result["sources"]
    lengths = np.asarray(table.train.lengths)
    assert source["tokens"] == lengths.sum()
    for at, name in enumerate(PAIR):
        assert source["lengths_after_truncation"][name]["max"] == lengths[:, at].max()
        assert source["lengths_after_truncation"][name]["mean"] == pytest.approx(
            lengths[:, at].mean(), abs=0.01
        )
    ends = [table.train.ids(i, "chosen")[-1] != tokenizer.eos_token_id for i in range(80)]
    assert source["without_end_token"]["chosen"] == pytest.approx(np.mean(ends), abs=1e-4)
    assert source["truncated"]["chosen"] == source["without_end_token"]["chosen"] > 0
    sharing = source["prefix_sharing"]
    assert sharing["separate_tokens"] == lengths.sum() + lengths[:, 0].sum()
    assert sharing["saving"] == pytest.approx(
        1 - lengths.sum() / sharing["separate_tokens"], abs=1e-4
    )
    assert "dpo.max_length" in settings_of(result)


def test_a_missing_end_token_is_a_warning(look, jsonl):
    rows = [row(i) for i in range(10)]
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows)), append_end_token=False))
    assert result["sources"][0]["without_end_token"] == {"chosen": 1.0, "rejected": 1.0}
    assert "data.append_end_token" in settings_of(result)


@pytest.mark.parametrize(
    ("longer", "warned"), [("chosen", True), ("rejected", True), (None, False)]
)
def test_length_bias_is_found_and_chance_is_not(look, jsonl, longer, warned):
    rows = []
    for i in range(60):
        made = row(i, chosen=" Yes {} " + "so " * (i % 7), rejected=" No {} " + "so " * (i * 3 % 7))
        if longer and i % 10 < 8:
            made[longer] += " and more words still" * 2
        rows.append(made)
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows))))
    assert ("dpo.loss_type" in settings_of(result)) is warned
    bias = result["sources"][0]["length_bias"]
    assert (bias["mean_difference"] > 5) == (longer == "chosen")


def test_leakage_is_counted_by_prompt_and_by_pair(look, jsonl):
    train = jsonl([row(i) for i in range(30)], "train.jsonl")
    other = [row(1), row(2, chosen=" Guess {}.", rejected=" {} miles."), row(3, chosen=" Far {}.")]
    evaluation = jsonl([*other, row(99)], "evaluation.jsonl")
    result = look(
        PreferenceDatasetConfig(dataset_name=str(train), eval_dataset_name=str(evaluation))
    )
    assert result["leakage"] == {"evaluation_rows": 4, "same_prompt": 3, "same_pair": 2}
    assert "data.eval_fraction" in settings_of(result)
    assert [s["role"] for s in result["sources"]] == ["train", "evaluation"]


def test_a_fraction_held_out_by_content_shares_no_pair(look, jsonl):
    rows = [row(i // 2) for i in range(80)]
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows)), eval_fraction=0.3))
    assert 0 < result["leakage"]["evaluation_rows"] < 80
    assert result["leakage"]["same_pair"] == 0
    assert result["sources"][0]["held_out"] == result["leakage"]["evaluation_rows"]


def test_too_many_bad_rows_are_a_warning(look, jsonl):
    rows = [row(i, chosen=" " if i < 5 else " c {}") for i in range(20)]
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows))), batch=50)
    assert {"data.max_dropped", "train.batch_size"} <= set(settings_of(result))


def test_examples_show_tokens_and_targets(look, jsonl, tokenizer):
    rows = [row(i, chosen=" Ünïcödé “{}” 漢字.") for i in range(9)] + [row(77, prompt="")]
    result = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows))), examples=10)
    assert len(result["examples"]) == 10
    for example in result["examples"]:
        prompt, *answers = example["columns"]
        assert not any(prompt["target"])
        for answer in answers:
            assert "".join(answer["tokens"]) == answer["text"]
            assert answer["text"].endswith("<|end|>")
            assert "\ufffd" not in answer["text"]
            # Without a prompt there is no token before the first token of an answer.
            assert answer["target"] == [
                bool(prompt["tokens"]),
                *[True] * (len(answer["tokens"]) - 1),
            ]
    again = look(PreferenceDatasetConfig(dataset_name=str(jsonl(rows[::-1]))), examples=10)
    texts = [sorted(e["columns"][1]["text"] for e in r["examples"]) for r in (result, again)]
    assert texts[0] == texts[1]


def test_instructions_and_documents_have_their_own_columns(look, jsonl):
    result = look(
        InstructionDatasetConfig(
            dataset_name=str(
                jsonl([{"instruction": f"say {i}", "output": f"{i}"} for i in range(9)])
            )
        ),
        "instructions",
    )
    assert list(result["sources"][0]["lengths"]) == ["prompt", "response"]
    assert result["sources"][0]["prefix_sharing"] is None
    text = [{"text": "a boat came in. " * 20} for _ in range(10)]
    result = look(
        DocumentDatasetConfig(dataset_name=str(jsonl(text, "d.jsonl"))), "documents", 64, batch=2
    )
    tokens = result["sources"][0]["tokens"]
    assert result["steps_per_epoch"] == -(-(tokens // 64) // 2)


def test_a_mixture_is_inspected_source_by_source(look, jsonl):
    files = [
        str(jsonl([row(i, prompt=n + " {}?") for i in range(10)], n))
        for n in ("a.jsonl", "b.jsonl")
    ]
    config = PreferenceDatasetConfig(
        sources=[{"dataset_name": files[0], "weight": 3}, {"dataset_name": files[1]}]
    )
    result = look(config, batch=8)
    assert [s["weight"] for s in result["sources"]] == [3, 1]
    assert result["rows"] == 20 and result["steps_per_epoch"] == 5


def test_summaries_equal_numpys():
    values = np.random.default_rng(0).integers(0, 900, 1000)
    found = summary_of(values)
    assert found["p95"] == pytest.approx(np.percentile(values, 95), abs=0.1)
    assert sum(found["histogram"]["counts"]) == 1000
    assert summary_of(values[:0]) == {"count": 0}
