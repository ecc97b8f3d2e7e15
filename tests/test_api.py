"""`ml.dpo`, `ml.sft`, `ml.pretrain`: options by keyword, models and rows that are objects."""

from __future__ import annotations

import json
import logging

import pytest
import yaml

import modern_llm as ml
from modern_llm.config.errors import ConfigError, UserError
from tests.helpers.ranks import run_ranks
from tests.helpers.text import transcripts

FIELDS = {"max_steps": 2, "batch_size": 4, "max_length": 96, "log_every": 1, "learning_rate": 1e-3}
INSTRUCTIONS = [{"prompt": f"one two {i}", "response": " three four"} for i in range(12)]


def losses(folder) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture
def objects(tiny_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint),
        AutoTokenizer.from_pretrained(tiny_checkpoint),
    )


def test_options_go_to_the_sections_that_have_them(tmp_path, tiny_checkpoint, tiny_pairs):
    final = ml.dpo(
        tiny_checkpoint, tiny_pairs, output_dir=tmp_path / "run", beta=0.3, eval_fraction=0.2,
        run_name="mine", **FIELDS,
    )  # fmt: skip
    assert final == tmp_path / "run" / "mine_final" and (final / "config.json").is_file()
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["dpo"]["beta"] == 0.3 and record["dpo"]["max_length"] == 96
    assert record["data"]["eval_fraction"] == 0.2 and record["train"]["max_steps"] == 2


def forms(rows):
    import datasets
    import pandas

    yield "list", rows
    yield "Dataset", datasets.Dataset.from_list(rows)
    yield "frame", pandas.DataFrame(rows)


def test_objects_train_as_the_files_do(tmp_path, tiny_checkpoint, tiny_pairs, objects):
    model, tokenizer = objects
    ml.dpo(tiny_checkpoint, tiny_pairs, output_dir=tmp_path / "files", **FIELDS)
    for name, rows in forms(transcripts(30)):
        out = tmp_path / name
        ml.dpo(model, rows, output_dir=out, tokenizer=tokenizer, **FIELDS)
        assert losses(out) == losses(tmp_path / "files"), name
        record = yaml.safe_load((out / "config.yaml").read_text())
        memory = out / "from_memory"
        assert record["data"]["dataset_name"].startswith(str(memory / "data-"))
        assert record["sft_checkpoint"].startswith(str(memory / "model-"))
        assert record["tokenizer_name"].startswith(str(memory / "tokenizer-"))
        assert len(list(memory.iterdir())) == 3


def test_the_same_objects_resume_and_others_are_refused(tmp_path, objects, caplog):
    model, tokenizer = objects
    rows, out = transcripts(30), tmp_path / "run"
    with caplog.at_level(logging.INFO):
        first = ml.dpo(model, rows, output_dir=out, tokenizer=tokenizer, **FIELDS)
        assert ml.dpo(model, rows, output_dir=out, tokenizer=tokenizer, **FIELDS) == first
    assert "already finished" in caplog.text
    with pytest.raises(UserError, match=r"data\.dataset_name: .* -> "):
        ml.dpo(model, rows[:-1], output_dir=out, tokenizer=tokenizer, **FIELDS)
    model.lm_head.weight.data[0, 0] += 1
    with pytest.raises(UserError, match="sft_checkpoint: .* -> "):
        ml.dpo(model, rows, output_dir=out, tokenizer=tokenizer, **FIELDS)


def test_a_model_brings_the_tokenizer_from_where_it_was_loaded(tmp_path, objects):
    ml.dpo(objects[0], transcripts(30), output_dir=tmp_path / "run", **FIELDS)
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert record["tokenizer_name"] == objects[0].name_or_path


def test_sft_and_pretraining(tmp_path, tiny_checkpoint, objects):
    fields = {"max_steps": 2, "batch_size": 4}
    final = ml.sft(tiny_checkpoint, INSTRUCTIONS, output_dir=tmp_path / "sft", **fields)
    assert (final / "config.json").is_file()
    shape = {"vocab_size": 300, "d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 32}
    rows = [{"text": "one two three " * 30} for _ in range(12)]
    final = ml.pretrain(
        shape, rows, tokenizer=objects[1], output_dir=tmp_path / "lm", eval_data=rows[:3], **fields
    )
    assert (final / "config.json").is_file()
    assert "eval/loss" in (tmp_path / "lm" / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_adapters_by_true_by_options_and_by_section(tmp_path, tiny_checkpoint, tiny_pairs):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    for number, lora in enumerate([True, {"rank": 4}, ml.LoraConfig(rank=4)]):
        out = tmp_path / str(number)
        final = ml.dpo(tiny_checkpoint, tiny_pairs, output_dir=out, lora=lora, **FIELDS)
        rank = json.loads((final / "adapter_config.json").read_text())["r"]
        assert rank == (16 if lora is True else 4)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"betta": 1}, ["betta is not an option", "did you mean beta?"]),
        ({"learning_rte": 1, "nothing_like_it": 2}, ["learning_rate", "nothing_like_it"]),
        ({"beta": "high"}, ["beta: Input should be a valid number"]),
        ({"dataset_name": "x"}, ["dataset_name is given as data="]),
        ({"tokenizer_name": "x"}, ["tokenizer_name is given as tokenizer="]),
        ({"lora": {"rnk": 3}}, ["rnk"]),
    ],
)
def test_wrong_options_are_one_error_before_anything_is_written(tmp_path, options, parts):
    with pytest.raises(ConfigError) as error:
        ml.dpo("model", "pairs.jsonl", output_dir=tmp_path / "run", **options)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"train": [], "test": []}, r"give one split, such as data\['train'\]"),
        (3, "int is not rows"),
        ([{"prompt": "a"}, "b"], r"data\[1\]: str is not a dict of columns"),
        ([{"prompt": object()}], r"data\[0\]: object has no JSON form"),
    ],
)
def test_wrong_data_is_named(tmp_path, data, text):
    with pytest.raises(UserError, match=text):
        ml.dpo("model", data, output_dir=tmp_path / "run")


def test_wrong_models_and_tokenizers_are_named(tmp_path, tiny_checkpoint, tiny_pairs):
    with pytest.raises(UserError, match="model: int is not a model"):
        ml.dpo(3, tiny_pairs, output_dir=tmp_path / "run")
    with pytest.raises(UserError, match="tokenizer: int is not a tokenizer"):
        ml.dpo(tiny_checkpoint, tiny_pairs, tokenizer=3, output_dir=tmp_path / "run")


def train_from_memory(checkpoint, out) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ml.dpo(model, transcripts(30), output_dir=out, **FIELDS)
    return losses(out)


@pytest.mark.slow
def test_two_processes_write_each_object_once(tmp_path, tiny_checkpoint):
    results = run_ranks(train_from_memory, 2, tiny_checkpoint, tmp_path / "two")
    assert results[0] == results[1]
    alone = train_from_memory(tiny_checkpoint, tmp_path / "one")
    assert results[0] == pytest.approx(alone, abs=1e-5)
    assert len(list((tmp_path / "two" / "from_memory").iterdir())) == 2
