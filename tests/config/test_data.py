"""The data sections refuse what contradicts itself, when they are built."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from modern_llm.config.data import (
    DocumentDatasetConfig,
    InstructionDatasetConfig,
    PreferenceDatasetConfig,
)


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (PreferenceDatasetConfig, {"tempalte": "chat"}, "tempalte"),
        (PreferenceDatasetConfig, {"format": "hhh"}, "'hh'"),
        (
            PreferenceDatasetConfig,
            {"template": "Question:"},
            "neither `chat`, nor a text with {prompt}",
        ),
        (InstructionDatasetConfig, {"template": ""}, "neither `chat`"),
        (PreferenceDatasetConfig, {"max_dropped": 1.5}, "less than or equal to 1"),
        (PreferenceDatasetConfig, {"eval_fraction": 0.0}, "greater than 0"),
        (PreferenceDatasetConfig, {"max_examples": 0}, "greater than 0"),
        (DocumentDatasetConfig, {"eval_fraction": 0.1, "eval_split": "test"}, "eval_split exclude"),
        (
            DocumentDatasetConfig,
            {"eval_fraction": 0.1, "eval_dataset_name": "x"},
            "eval_fraction and eval_dataset_name exclude each other",
        ),
        (DocumentDatasetConfig, {"eval_split": "train"}, "'train' is the split to train on"),
        (DocumentDatasetConfig, {"split": "a", "eval_split": "a"}, "'a' is the split to train on"),
        (
            InstructionDatasetConfig,
            {"max_length": 10, "max_prompt_length": 10},
            "max_prompt_length 10 leaves no token for the answer in max_length 10",
        ),
    ],
)
def test_contradictions_are_refused(section, fields, message):
    with pytest.raises(ValidationError) as caught:
        section(**fields)
    assert message in str(caught.value)


def test_what_goes_together_is_taken():
    pairs = PreferenceDatasetConfig(
        eval_dataset_name="other", eval_split="train", template="{prompt}\n"
    )
    assert (pairs.eval_dataset_name, pairs.eval_split) == ("other", "train")
    assert pairs.template == "{prompt}\n"
    documents = DocumentDatasetConfig(split="a", eval_split="train")
    assert (documents.split, documents.eval_split) == ("a", "train")
    jinja = "{% for m in messages %}{% endfor %}"
    answers = InstructionDatasetConfig(max_prompt_length=2000, template=jinja)
    assert (answers.max_prompt_length, answers.template) == (2000, jinja)
