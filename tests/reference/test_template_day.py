"""The date that a chat template writes: one for a run, kept on resume and by the store."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
import yaml

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.config.errors import ConfigError, StorageError, UserError
from modern_llm.reference import template_day
from modern_llm.reference.commands import fill_reference
from modern_llm.training.train_dpo import run_dpo
from tests.helpers.text import make_checkpoint

DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_model(folder: Path, tokenizer: Path, template: str) -> Path:
    """A tiny checkpoint whose tokenizer has a chat template."""
    model = make_checkpoint(folder, tokenizer)
    (model / "chat_template.jinja").write_text(template)
    return model


class Calendar(date):
    """Today is what the test says."""

    day = "2026-11-25"

    @classmethod
    def today(cls) -> date:
        return date.fromisoformat(cls.day)


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> type[Calendar]:
    monkeypatch.setattr(template_day, "date", Calendar)
    monkeypatch.setattr(Calendar, "day", "2026-11-25")
    return Calendar


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i} + 3?"}],
            "chosen": [{"role": "assistant", "content": str(i + 3)}],
            "rejected": [{"role": "assistant", "content": "no idea"}],
        }
        for i in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def settings(tmp_path: Path, name: str, **train) -> TrainingConfig:
    return TrainingConfig(
        run_name="r",
        output_dir=tmp_path / name,
        batch_size=4,
        **{"max_steps": 1, "log_every": 1, **train},
    )


def recorded(tmp_path: Path, name: str) -> str | None:
    return yaml.safe_load((tmp_path / name / "config.yaml").read_text())["data"]["template_date"]


def test_a_store_filled_yesterday_has_every_value_today(
    tmp_path, tiny_tokenizer, calendar, pairs, caplog
):
    model = chat_model(tmp_path / "model", tiny_tokenizer, DATED)
    data = PreferenceDatasetConfig(dataset_name=pairs)
    short = DPOConfig(max_length=64)
    first = fill_reference(model, settings(tmp_path, "fill"), short, data)
    assert (first["needed"], first["scored"]) == (16, 16)
    calendar.day = "2026-11-26"
    caplog.set_level("INFO")
    stored = DPOConfig(max_length=64, reference="store")
    run_dpo(model, settings(tmp_path, "next"), stored, data)
    assert recorded(tmp_path, "next") == "2026-11-25"
    assert "reads the date, which is 2026-11-25 throughout" in caplog.text
    again = fill_reference(model, settings(tmp_path, "again"), short, data)
    assert (again["found"], again["scored"]) == (16, 0)
    other = PreferenceDatasetConfig(dataset_name=pairs, template_date="2026-11-26")
    with pytest.raises(StorageError, match="lacks 16 of 16 answers"):
        run_dpo(model, settings(tmp_path, "other"), stored, other)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_day(
    tmp_path, tiny_tokenizer, calendar, pairs, own_reference_cache
):
    model = chat_model(tmp_path / "model", tiny_tokenizer, DATED)
    data = PreferenceDatasetConfig(dataset_name=pairs)
    dpo = DPOConfig(max_length=64, reference="model")
    run_dpo(model, settings(tmp_path, "run", save_every=1, max_steps=2), dpo, data)
    calendar.day = "2026-11-27"
    longer = settings(tmp_path, "run", save_every=1, max_steps=3, accept_change=True)
    run_dpo(model, longer, dpo, data)
    assert recorded(tmp_path, "run") == "2026-11-25"
    moved = PreferenceDatasetConfig(dataset_name=pairs, template_date="2026-11-27")
    with pytest.raises(UserError, match="data.template_date: '2026-11-25' -> '2026-11-27'"):
        run_dpo(model, longer, dpo, moved)


def test_a_day_that_has_no_effect_is_refused_and_none_is_recorded(tmp_path, tiny_tokenizer, pairs):
    model = chat_model(
        tmp_path / "model", tiny_tokenizer, DATED.replace("strftime_now('%d %b %Y')", "''")
    )
    dpo = DPOConfig(max_length=64, reference="model")
    data = PreferenceDatasetConfig(dataset_name=pairs, template_date="2026-11-27")
    with pytest.raises(ConfigError, match="template_date 2026-11-27 has no effect"):
        run_dpo(model, settings(tmp_path, "run"), dpo, data)
    run_dpo(model, settings(tmp_path, "run"), dpo, PreferenceDatasetConfig(dataset_name=pairs))
    assert recorded(tmp_path, "run") is None


@pytest.mark.parametrize("day", ["26.11.2026", "2026-13-01", "today", "20261126"])
def test_a_day_that_is_none_is_refused(day):
    with pytest.raises(ValueError, match="is not a day: write it as YYYY-MM-DD"):
        PreferenceDatasetConfig(dataset_name="d", template_date=day)
