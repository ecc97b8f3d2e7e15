"""Encoding of pairs with every kind of prompt, on our own text and on real pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modern_llm.config.errors import DataError, UserError
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table.build import prepare_tables

PLAIN_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|done|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = "{{ bos_token }}" + PLAIN_CHAT
STRICT = (
    PLAIN_CHAT
    + "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)
USER = {"role": "user", "content": " Hi "}


def talk(answer: str, *before: dict) -> list[dict]:
    return [*before, USER, {"role": "assistant", "content": answer}]


def build(path: Path, tokenizer, **options):
    lengths = {k: options.pop(k) for k in ("max_length", "max_prompt_length") if k in options}
    config = PreferenceDatasetConfig(dataset_name=str(path), **options)
    return prepare_tables(config, tokenizer, path.parent / "tables", **lengths)


def words(prepared, tokenizer) -> list[list[str]]:
    table = prepared.train
    return [[tokenizer.decode(table.ids(i, c)) for c in table.columns] for i in range(len(table))]


def test_strings_get_leading_tokens_and_the_end_token(jsonl, make_tokenizer):
    tokenizer = make_tokenizer(begin=True, chat=CHAT)
    rows = [
        {"prompt": " a", "chosen": " b", "rejected": "c<|end|>"},
        {"prompt": "<|begin|>a longer one", "chosen": "b\n", "rejected": "<|end|> c"},
    ]
    assert words(build(jsonl(rows), tokenizer), tokenizer) == [
        ["<|begin|> a", " b<|end|>", "c<|end|>"],
        ["<|begin|>a longer one", "b\n<|end|>", "<|end|> c<|end|>"],
    ]


def test_messages_get_what_the_chat_template_writes(jsonl, make_tokenizer):
    tokenizer = make_tokenizer(begin=True, chat=CHAT)
    rows = [
        {"chosen": talk(" yes "), "rejected": talk("no<|done|>")},
        {
            "chosen": talk("y", {"role": "system", "content": "s"}),
            "rejected": talk("n", {"role": "system", "content": "s"}),
        },
    ]
    prepared = build(jsonl(rows), tokenizer)
    assert words(prepared, tokenizer) == [
        ["<|begin|><|user|> Hi <|done|><|assistant|>", " yes <|done|>", "no<|done|>"],
        ["<|begin|><|system|>s<|done|><|user|> Hi <|done|><|assistant|>", "y<|done|>", "n<|done|>"],
    ]
    assert prepared.report.notes == []
    # A chat template without such a token is meant to be so.
    bare = make_tokenizer(begin=True, chat=PLAIN_CHAT)
    assert words(build(jsonl(rows[:1]), bare), bare)[0][0] == "<|user|> Hi <|done|><|assistant|>"


def test_a_tokenizer_without_a_chat_template_is_logged(jsonl, tokenizer):
    prepared = build(jsonl([{"chosen": talk("yes"), "rejected": talk("no")}]), tokenizer)
    assert words(prepared, tokenizer) == [
        ["<|user|>\n Hi <|end|>\n<|assistant|>\n", "yes<|end|>", "no<|end|>"]
    ]
    (note,) = prepared.report.notes
    assert "no chat template" in note and note in prepared.report.lines()


def test_templates_for_strings(jsonl, make_tokenizer):
    tokenizer = make_tokenizer(chat=PLAIN_CHAT)
    path = jsonl([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    framed = build(path, tokenizer, template="Q: {prompt}\nA:")
    assert words(framed, tokenizer) == [["Q: p\nA:", "c<|end|>", "r<|end|>"]]
    chat = build(path, tokenizer, template="chat")
    assert words(chat, tokenizer) == [["<|user|>p<|done|><|assistant|>", "c<|done|>", "r<|done|>"]]
    jinja = build(path, tokenizer, template="{% for m in messages %}({{ m.content }}){% endfor %}")
    assert words(jinja, tokenizer) == [["(p)", "(c)<|end|>", "(r)<|end|>"]]


def test_a_row_that_a_chat_template_refuses_is_named(jsonl, make_tokenizer):
    system = {"role": "system", "content": "s"}
    rows = [
        {"chosen": talk("yes"), "rejected": talk("no")},
        {"chosen": talk("yes", system), "rejected": talk("no", system)},
    ]
    with pytest.raises(
        DataError, match=":2: the chat template refuses the messages: no system turn"
    ):
        build(jsonl(rows), make_tokenizer(chat=STRICT))
    kept = build(jsonl(rows), make_tokenizer(chat=STRICT), on_bad_row="skip")
    assert len(kept.train) == 1


def test_lengths(jsonl, tokenizer):
    rows = [
        {"prompt": "0123456789", "chosen": "abcdef", "rejected": "x"},
        {"prompt": "01", "chosen": "abcdefghijkl", "rejected": "xyz"},
    ]
    prepared = build(jsonl(rows), tokenizer, max_length=8, max_prompt_length=3)
    assert words(prepared, tokenizer) == [
        ["789", "abcde", "x<|end|>"],
        ["01", "abcdef", "xyz<|end|>"],
    ]
    report = prepared.report
    assert (report.prompts_cut, report.responses_cut) == (1, 2)
    assert report.tokens_cut == 7 + 2 + 7
    assert "cut to length: 1 prompts, 2 answers, 16 tokens in all" in report.lines()
    with pytest.raises(UserError, match="max_prompt_length 8 .*max_length 8"):
        build(jsonl(rows), tokenizer, max_length=8, max_prompt_length=8)


def test_parquet_csv_and_json_give_the_same_tables(jsonl, tokenizer, tmp_path, pairs):
    import csv

    import pyarrow
    import pyarrow.parquet

    rows = pairs(20)
    digest = build(jsonl(rows), tokenizer).train.digest
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for suffix in ("json", "parquet", "csv"):
        assert build(tmp_path / f"rows.{suffix}", tokenizer).train.digest == digest


# Real pairs


def test_hh_transcripts_of_the_sample(shared: Path, tmp_path: Path):
    """All rows except the two known bad ones, split at the last assistant turn."""
    source = shared / "data" / "hh_rlhf_sample.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    config = PreferenceDatasetConfig(dataset_name=str(source))
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=4096)
    report = prepared.report
    assert (report.rows, report.kept, report.formats) == (497, 495, {"hh": 495})
    assert report.drops == {"empty response": 1, "transcripts differ before the last turn": 1}
    listed = [
        json.loads(line) for line in (tmp_path / "t/dropped_rows.jsonl").read_text().splitlines()
    ]
    assert listed == [
        {"origin": f"{source}:230", "reason": "empty response"},
        {"origin": f"{source}:357", "reason": "transcripts differ before the last turn"},
    ]
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    table = prepared.train
    for i in range(len(table)):
        row = rows[int(table.origin(i).rpartition(":")[2]) - 1]
        prompt, chosen, rejected = (tokenizer.decode(table.ids(i, c)) for c in table.columns)
        assert prompt.endswith("\n\nAssistant:")
        for answer, side in ((chosen, "chosen"), (rejected, "rejected")):
            assert "\n\nAssistant:" not in answer
            assert prompt + answer == row[side] + "<|endoftext|>"


def test_ids_of_the_golden_pairs(shared: Path, tmp_path: Path):
    """The ids that the reference vectors were computed from, with their lengths."""
    golden = json.loads((shared / "golden/llama/pairs.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(shared / "golden/llama/policy")
    path = tmp_path / "pairs.jsonl"
    columns = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps({c: p[c] for c in columns}) + "\n" for p in golden))
    config = PreferenceDatasetConfig(dataset_name=str(path))
    table = prepare_tables(config, tokenizer, tmp_path / "t", max_length=4096).train
    for i, pair in enumerate(golden):
        for column in columns:
            assert table.ids(i, column).tolist() == pair[f"{column}_ids"]


def test_sharegpt_pairs_of_the_sample(shared: Path, tmp_path: Path):
    source = shared / "data" / "preference_sharegpt_sample.json"
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    tokenizer.chat_template = CHAT
    config = PreferenceDatasetConfig(dataset_name=str(source))
    prepared = prepare_tables(config, tokenizer, tmp_path / "t", max_length=8192)
    rows = json.loads(source.read_text(encoding="utf-8"))
    assert prepared.report.kept == len(rows) == 180 and prepared.report.formats == {"sharegpt": 180}
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for i, row in enumerate(rows):
        turns = (f"<|{roles[m['from']]}|>{m['value']}<|done|>" for m in row["conversations"])
        head = "<|endoftext|>" + "".join(turns) + "<|assistant|>"
        prompt, rejected = (prepared.train.ids(i, name).tolist() for name in ("prompt", "rejected"))
        whole = head + row["rejected"]["value"] + "<|done|>" + "<|endoftext|>"
        assert prompt + rejected == tokenizer(whole)["input_ids"]
        # A token that starts inside the prompt's text belongs to the answer.
        assert head.startswith(tokenizer.decode(prompt)) and len(prompt) > len(head) / 8
        line = prepared.train.origin(i).removeprefix(f"{source}:").partition("[")[0]
        assert source.read_text(encoding="utf-8").split("\n")[int(line) - 1] == "{"
