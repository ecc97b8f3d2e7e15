"""Rows of token ids: read and checked with their place, trained on as they are, without a tokenizer
where none is named."""

from __future__ import annotations

import json

import numpy as np
import pytest

from modern_llm.cli import main
from modern_llm.config.errors import DataError, UserError
from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.mismatched import MISMATCHED, MismatchedTable
from modern_llm.data.batch.order import Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.instruction_datasets import InstructionDatasetConfig
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table.build import holds_ids, prepare_tables
from modern_llm.reference.answers import Answers
from modern_llm.reference.keys import entry_key


def pair(prompt, chosen, rejected, **more):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


PAIRS = [pair([1, 2, 3], [4, 5], [6]), pair([7], [8, 9, 2], [8]), pair([7], [3], [4, 4])]


def read(tmp_path, path, tokenizer=None, kind=PreferenceDatasetConfig, length=64, **options):
    config = kind(dataset_name=str(path), **options)
    return prepare_tables(config, tokenizer, tmp_path / "tables", max_length=length)


def test_ids_are_trained_on_as_they_are(tmp_path, jsonl, tokenizer):
    path = jsonl(PAIRS)
    for found in (read(tmp_path, path), read(tmp_path, path, tokenizer)):
        table = found.train
        rows = [
            [table.ids(row, name).tolist() for name in ("prompt", "chosen", "rejected")]
            for row in range(3)
        ]
        assert rows == [list(row.values()) for row in PAIRS]
        assert table.origin(1) == f"{path}:2" and found.report.formats == {"token_ids": 3}


def test_of_over_long_rows_the_prompt_loses_its_start_and_the_response_its_end(tmp_path, jsonl):
    path = jsonl([pair(list(range(10)), [20, 21, 22, 23, 24, 25], [26])])
    found = read(tmp_path, path, length=8)
    table = found.train
    assert table.ids(0, "prompt").tolist() == [6, 7, 8, 9]
    assert table.ids(0, "chosen").tolist() == [20, 21, 22, 23]
    assert (found.report.prompts_cut, found.report.responses_cut) == (1, 1)


def test_instructions_too(tmp_path, jsonl):
    rows = [
        {"prompt_ids": [1], "response_ids": [2, 3]},
        {"prompt_ids": [], "response_ids": [2, 3]},
    ]
    table = read(tmp_path, jsonl(rows), kind=InstructionDatasetConfig).train
    assert [table.ids(row, "response").tolist() for row in (0, 1)] == [[2, 3]] * 2
    named = jsonl([{"prompt_ids": [1], "completion_ids": [5]}], "other.jsonl")
    table = read(tmp_path, named, kind=InstructionDatasetConfig).train
    assert table.ids(0, "response").tolist() == [5]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair([1], [2, -3], [4]), "column 'chosen_ids', entry 1 is '-3', expected a whole number"),
        (pair([1], [2.5], [4]), "column 'chosen_ids', entry 0 is '2.5'"),
        (pair([True], [2], [4]), "column 'prompt_ids', entry 0 is 'True'"),
        (pair([1], ["2"], [4]), "column 'chosen_ids', entry 0 is '2'"),
        (pair([1], [2], [2**31]), "column 'rejected_ids', entry 0 is '2147483648'"),
        (pair("1 2", [2], [3]), "column 'prompt_ids' is '1 2', expected a list of whole numbers"),
        (pair([1], [2], [3], chosen_targets=[1, 0]), "column 'chosen_targets' has 2 numbers for 1"),
        (pair([1], [2], [3], chosen_targets=[2]), "'chosen_targets', entry 0 is '2'"),
    ],
)
def test_bad_ids_are_an_error_with_file_and_line(tmp_path, jsonl, row, reason):
    path = jsonl([*PAIRS, row])
    with pytest.raises(DataError) as error:
        read(tmp_path, path)
    assert str(error.value).startswith(f"{path}:4: ") and reason in str(error.value)


def test_rows_without_anything_to_learn_are_dropped(tmp_path, jsonl):
    rows = [*PAIRS, pair([1], [2], [2]), pair([1], [], [2]), pair([], [3], [4, 5])]
    rows.append(pair([1], [2], [3], rejected_targets=[0]))
    report = read(tmp_path, jsonl(rows), max_dropped=1.0).report
    assert report.drops == {
        "empty response": 1,
        "empty response after truncation": 1,
        "equal responses": 1,
        "no token to train on": 1,
    }


def test_a_template_or_text_beside_ids_is_refused(tmp_path, jsonl):
    with pytest.raises(DataError, match="data.template has no effect on token ids"):
        read(tmp_path, jsonl(PAIRS), None, template="{prompt}")
    text = jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}], "text.jsonl")
    assert not holds_ids(PreferenceDatasetConfig(dataset_name=str(text)))
    with pytest.raises(DataError, match="there is no tokenizer: name one"):
        read(tmp_path, text)


def test_inspect_reads_what_it_writes_and_needs_no_tokenizer(tmp_path, jsonl, capsys):
    path, out = jsonl([*PAIRS, pair([], [2, 3], [4, 5])]), tmp_path / "out.jsonl"
    assert main(["inspect", "--data", str(path), "--tokens", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["kept"] == 4 and result["tokenizer"] is None
    columns = result["examples"][0]["columns"]
    assert all(column["text"].split() for column in columns if column["tokens"])
    again = tmp_path / "again.jsonl"
    assert main(["inspect", "--data", str(out), "--tokens", str(again), "--json"]) == 0

    def content(file):
        rows = map(json.loads, file.read_text().splitlines())
        return [{k: v for k, v in row.items() if k != "origin"} for row in rows]

    assert content(again) == content(out)


@pytest.fixture
def untokenized(tmp_path):
    """A small Llama in a folder without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=32, num_attention_heads=2, num_key_value_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_dpo_and_sft_train_on_ids_without_any_tokenizer(tmp_path, jsonl, untokenized, monkeypatch):
    from modern_llm import DPOConfig, TrainingConfig, run_dpo, run_sft

    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    options = {"batch_size": 3, "max_steps": 2, "log_every": 1, "save_every": 1}
    train = TrainingConfig(run_name="d", output_dir=tmp_path / "dpo", **options)
    data = PreferenceDatasetConfig(dataset_name=str(jsonl(PAIRS)))
    final = run_dpo(untokenized, train, DPOConfig(max_length=16), data)
    assert (final / "config.json").is_file() and not list(final.glob("tokenizer*"))
    lines = (tmp_path / "dpo" / "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(lines[0])["loss"] - np.log(2)) < 1e-6
    train = TrainingConfig(run_name="s", output_dir=tmp_path / "sft", **options)
    rows = [{"prompt_ids": row["prompt_ids"], "response_ids": row["chosen_ids"]} for row in PAIRS]
    data = InstructionDatasetConfig(dataset_name=str(jsonl(rows, "sft.jsonl")), max_length=16)
    assert (run_sft(final, train, data) / "config.json").is_file()


def test_an_id_outside_the_embedding_names_file_and_line(tmp_path, jsonl, untokenized, monkeypatch):
    from modern_llm import DPOConfig, TrainingConfig, run_dpo

    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    path = jsonl([*PAIRS, pair([1], [2, 32], [4])])
    train = TrainingConfig(run_name="d", output_dir=tmp_path / "run", batch_size=2, max_steps=1)
    data = PreferenceDatasetConfig(dataset_name=str(path))
    with pytest.raises(UserError) as error:
        run_dpo(untokenized, train, DPOConfig(max_length=16), data)
    assert str(error.value).startswith(f"{path}:4: token id 32 but embedding has 32 rows")


MASKED = [
    pair([1, 2], [3, 4, 5, 6, 7], [8, 9], chosen_targets=[1, 0, 0, 1, 1]),
    pair([1, 2], [3, 4, 5, 6, 7], [8, 9]),
    pair([4], [5], [6, 7], rejected_targets=[0, 1]),
]


def test_masks_leave_tokens_out_of_training(tmp_path, jsonl):
    table = read(tmp_path, jsonl([*PAIRS, *MASKED])).train
    assert table.masked and table.gaps(3, "chosen").tolist() == [[1, 3]]
    assert table.gaps(0, "chosen").shape == table.gaps(4, "chosen").shape == (0, 2)
    assert table.trained[3:].tolist() == [[2, 3, 2], [2, 5, 2], [1, 1, 1]]
    assert table.lengths[3].tolist() == [2, 5, 2]
    part = table.select([5, 3])
    assert part.gaps(1, "chosen").tolist() == [[1, 3]] and part.trained[0].tolist() == [1, 1, 1]
    assert table.first_difference(part) == 0 and part.first_difference(part) is None
    assert table.select(range(6)).digest == table.digest
    examples = Examples(table, trees=True)
    assert examples.targets(np.array([3, 5])).tolist() == [[3, 2], [1, 1]]


@pytest.mark.parametrize("trees", [True, False])
def test_a_batch_has_the_trained_tokens_as_targets(tmp_path, jsonl, trees):
    table = read(tmp_path, jsonl(MASKED)).train
    shared = Sharing.ROWS if trees else Sharing.ALONE
    batch = collate(Examples(table, trees=trees), [0, 1, 2], shared=shared)
    assert batch.lengths.tolist() == [[3, 2], [5, 2], [1, 1]]
    labels = [[] for _ in range(6)]
    for slot, label in zip(
        batch.slots.tolist(), batch.uses(batch.targets[1]).tolist(), strict=True
    ):
        labels[slot].append(label)
    assert labels == [[3, 6, 7], [8, 9], [3, 4, 5, 6, 7], [8, 9], [5], [7]]
    # Each target is predicted by the state of the token before it.
    ids = batch.ids.flatten()
    before = dict(zip(batch.targets[1].tolist(), ids[batch.targets[0]].tolist(), strict=True))
    assert (before[6], before[3], before[7]) == (5, 2, 6)


def test_tables_without_masks_have_no_file_for_them_and_the_digest_of_before(tmp_path, jsonl):
    plain = read(tmp_path, jsonl(PAIRS)).train
    assert not plain.masked and not list(plain.folder.glob("gap*"))
    rows = [row | {"chosen_targets": [1] * len(row["chosen_ids"])} for row in PAIRS]
    whole = read(tmp_path / "whole", jsonl(rows, "whole.jsonl")).train
    assert whole.digest == plain.digest and not whole.masked


def test_masked_answers_have_names_of_their_own(tmp_path, jsonl):
    table = read(tmp_path, jsonl(MASKED)).train
    answers = Answers(table)
    keys = answers.keys[answers.of_pairs]
    assert keys[0, 0] != keys[1, 0] and keys[0, 1] == keys[1, 1]
    assert keys[1, 0].ljust(16, b"\0") == entry_key(table.ids(1, "prompt"), table.ids(1, "chosen"))
    assert answers.targets[answers.of_pairs].tolist() == [[3, 2], [5, 2], [1, 1]]


def test_a_cut_ends_at_the_last_trained_token(tmp_path, jsonl):
    row = pair([1], [2, 3, 4, 5, 6, 7], [8], chosen_targets=[1, 1, 0, 0, 1, 1])
    table = read(tmp_path, jsonl([row]), length=4).train
    assert table.ids(0, "chosen").tolist() == [2, 3] and not table.masked
    late = pair([1], [2, 3, 4, 5, 6, 7], [8], chosen_targets=[0, 0, 0, 0, 1, 1])
    with pytest.raises(DataError, match="1 empty response after truncation"):
        read(tmp_path / "late", jsonl([late], "late.jsonl"), length=4)


def test_inspect_writes_and_reads_masks(tmp_path, jsonl, capsys):
    out = tmp_path / "out.jsonl"
    assert main(["inspect", "--data", str(jsonl(MASKED)), "--tokens", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["examples"]
    targets = {example["origin"][-1]: example["columns"] for example in shown}
    assert targets["1"][1]["target"] == [True, False, False, True, True]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "origin"} for row in written] == MASKED


def test_mismatched_responses_of_kto_keep_their_masks(tmp_path, jsonl):
    rows = [
        {"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6], "response_targets": [1, 0, 1, 0]},
        {"prompt_ids": [7, 8, 9], "response_ids": [2, 3]},
    ]
    table = read(tmp_path, jsonl(rows), kind=InstructionDatasetConfig, length=6).train
    both = MismatchedTable(table, np.array([1, 0]), 6)
    assert both.masked and both.gaps(1, MISMATCHED).tolist() == [[1, 2]]
    assert both.gaps(0, MISMATCHED).shape == (0, 2)
    assert both.lengths.tolist() == [[2, 4, 2], [3, 2, 3]]
    assert both.trained.tolist() == [[2, 2, 2], [3, 2, 2]]
