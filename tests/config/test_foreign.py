"""Every option of the published configurations of other trainers is in their tables."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from transformers import TrainingArguments

from modern_llm.config.foreign import TOOLS, hugging_face, meaning_here
from modern_llm.verbs.migration.rules import RULES
from modern_llm.verbs.settings import option_names
from modern_llm.verbs.stages import STAGES
from tests.config import published_names

BY_NAME = {tool.name: tool for tool in TOOLS}
KNOWN = {stage.name: option_names(stage.settings) for stage in STAGES}


@pytest.mark.parametrize(
    ("tool", "names"),
    [
        ("TRL", published_names.TRL),
        ("Axolotl", published_names.AXOLOTL),
        ("LLaMA-Factory", published_names.LLAMA_FACTORY),
    ],
)
def test_every_published_name_is_classified(tool, names):
    assert len(names) > 60
    assert [name for name in names if not BY_NAME[tool].group(name)] == []


@pytest.mark.parametrize("tool", ["TRL", "LLaMA-Factory"])
def test_every_training_argument_of_the_installed_transformers_is_classified(tool):
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    assert [name for name in names if not BY_NAME[tool].group(name)] == []


def test_the_defaults_of_the_tables_are_those_of_transformers():
    fields = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    assert {name: fields[name] for name in hugging_face.DEFAULTS} == hugging_face.DEFAULTS


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_a_name_is_in_one_group_and_its_row_leads_to_an_option_and_a_rule(tool):
    groups = [*tool.not_needed.values(), *tool.no_equivalent.values()]
    counts = Counter(name for group in groups for name in group.split()) + Counter(list(tool.rows))
    assert [name for name, count in counts.items() if count > 1] == []
    for name, row in tool.rows.items():
        assert row.rule in RULES, name
        for target in row.targets:
            assert any(target in known for known in KNOWN.values()), f"{name}: {target}"
    assert set(tool.defaults) <= set(tool.rows)


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("logging_steps", "logging_steps of TRL is train.log_every here)"),
        ("num_train_epochs", "of TRL is train.epochs here)"),
        ("micro_batch_size", "of Axolotl is train.batch_size here: the examples of one optimizer"),
        ("pref_beta", "of LLaMA-Factory is dpo.beta here)"),
        ("cutoff_len", "of LLaMA-Factory is dpo.max_length here: an over-long"),
        ("sample_packing", "of Axolotl needs no option here: rows are packed"),
        ("trust_remote_code", "of TRL has no equivalent here: code of a model's"),
    ],
)
def test_a_foreign_name_is_recognised_by_its_meaning(word, meaning):
    assert meaning in meaning_here(word, KNOWN["dpo"])


def test_a_name_of_nobody_has_no_meaning():
    assert meaning_here("lerning_rate", KNOWN["dpo"]) == ""
