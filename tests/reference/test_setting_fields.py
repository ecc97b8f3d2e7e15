"""Every setting is classified: it changes what a stored value is, or it scores nothing again.

A new field of a configuration fails here until it is put into the table.
"""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.dpo import DPOConfig
from modern_llm.reference import commands
from modern_llm.reference.commands import Request, fill_reference
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

KEY = "in the key"
FREE = "not in the key"
TOKENS = "asks for the values of every token"
ELSEWHERE = "no local data or single process can change it; what it reads is in the key by content"

# field -> (class, another value, what else must be said with it)
FIELDS = {
    "run": {
        "sft_checkpoint": (KEY, "{place}/other", {}),
        "tokenizer_name": (KEY, "{place}/coarse", {}),
    },
    "train": {
        "run_name": (FREE, "another", {}),
        "dataset_name": (FREE, "{place}/pairs.jsonl", {}),
        "tokenizer_name": (KEY, "{place}/coarse", {}),
        "output_dir": (FREE, "{place}/elsewhere", {}),
        "batch_size": (FREE, 3, {}),
        "micro_batch_size": (FREE, 2, {}),
        "gradient_accumulation_steps": (FREE, 2, {}),
        "tokens_per_micro_batch": (FREE, 700, {}),
        "max_steps": (FREE, 7, {}),
        "epochs": (FREE, 2.0, {}),
        "learning_rate": (FREE, 1e-6, {}),
        "schedule": (FREE, "linear", {}),
        "warmup_steps": (FREE, 2, {}),
        "warmup_ratio": (FREE, 0.1, {}),
        "min_learning_rate_ratio": (FREE, 0.1, {}),
        "weight_decay": (FREE, 0.3, {}),
        "adam_beta1": (FREE, 0.8, {}),
        "adam_beta2": (FREE, 0.9, {}),
        "adam_epsilon": (FREE, 1e-6, {}),
        "max_grad_norm": (FREE, None, {}),
        "router_loss_coefficient": (FREE, 0.0, {}),
        "on_nonfinite": (FREE, "skip", {}),
        "skip_loss_spikes": (FREE, 6.0, {}),
        "mixed_precision": (KEY, "bf16", {}),
        "weights": (KEY, "bfloat16", {"mixed_precision": "bf16"}),
        "optimizer": (FREE, "adafactor", {}),
        "gradient_checkpointing": (FREE, True, {}),
        "sequence_parallel": (ELSEWHERE, None, {}),
        "mlp_chunk": (FREE, 7, {}),
        "compile": (FREE, True, {}),
        "attention": (FREE, "separate", {}),
        "attn_implementation": (FREE, "eager", {"attention": "separate"}),
        "seed": (FREE, 7, {}),
        "log_every": (FREE, 1, {}),
        "profile_steps": (FREE, 1, {}),
        "hang_timeout": (FREE, 99.0, {}),
        "eval_every": (FREE, 1, {}),
        "save_every": (FREE, 1, {}),
        "keep_checkpoints": (FREE, 1, {}),
        "keep_best": (FREE, True, {}),
        "best_metric": (FREE, "eval/loss", {"keep_best": True}),
        "early_stopping_patience": (FREE, 2, {}),
        "background_saving": (FREE, True, {}),
        "resume": (FREE, "never", {}),
        "accept_change": (FREE, True, {}),
        "trackers": (FREE, ["tensorboard"], {}),
        "tracker_project": (FREE, "p", {"trackers": ["tensorboard"]}),
        "generate_every": (FREE, 5, {"generate_prompts": ["a"]}),
        "generate_prompts": (FREE, ["a"], {"generate_every": 5}),
        "generate_tokens": (FREE, 9, {"generate_every": 5, "generate_prompts": ["a"]}),
    },
    "dpo": {
        "beta": (FREE, 0.3, {}),
        "max_length": (KEY, 50, {}),
        "label_smoothing": (FREE, 0.1, {}),
        "max_prompt_length": (KEY, 10, {}),
        "group_by_prompt": (FREE, True, {}),
        "loss_type": (FREE, "ipo", {}),
        "loss_weights": (FREE, [0.5, 2.0], {"loss_type": ["sigmoid", "sft"]}),
        "f_divergence": (FREE, "js_divergence", {}),
        "f_alpha": (FREE, 0.3, {"f_divergence": "alpha_divergence"}),
        "use_weighting": (FREE, True, {}),
        "nll_coefficient": (FREE, 0.5, {}),
        "discopop_tau": (FREE, 0.1, {"loss_type": "discopop"}),
        "simpo_gamma": (FREE, 0.1, {"loss_type": "simpo"}),
        "dpop_lambda": (FREE, 1.0, {"loss_type": "dpop"}),
        "ld_alpha": (TOKENS, 0.5, {}),
        "reference": (FREE, "store", {}),
        "reference_checkpoint": (KEY, "{place}/other", {}),
        "reference_digest": (FREE, "{digest}", {"reference": "store"}),
        "reference_store": (FREE, "{store}", {"reference": "store"}),
        "reference_sync_every": (FREE, 2, {}),
        "reference_mixup": (FREE, 0.5, {"reference_sync_every": 2}),
        "keep_token_logprobs": (TOKENS, True, {}),
        "flush_every": (FREE, 3, {}),
        "self_check_pairs": (FREE, 2, {}),
    },
    "data": {
        "dataset_name": (FREE, "{place}/shuffled.jsonl", {}),
        "sources": (ELSEWHERE, None, {}),
        "subset": (ELSEWHERE, None, {}),
        "split": (FREE, "train", {}),
        "columns": (ELSEWHERE, None, {}),
        "eval_split": (ELSEWHERE, None, {}),
        "eval_dataset_name": (FREE, "{place}/shuffled.jsonl", {}),
        "eval_fraction": (FREE, 0.3, {}),
        "on_bad_row": (FREE, "skip", {}),
        "max_dropped": (FREE, 0.5, {}),
        "max_examples": (FREE, 11, {}),
        "pair_values": (FREE, [], {}),
        "rankings": (FREE, "all_pairs", {}),
        "targets": (ELSEWHERE, None, {}),
        "order": (FREE, "length", {}),
        "streaming": (ELSEWHERE, None, {}),
        "streaming_window": (ELSEWHERE, None, {}),
        "format": (FREE, "hh", {}),
        "template": (KEY, "Q: {{prompt}}", {}),
        "template_date": (ELSEWHERE, None, {}),
        "append_end_token": (KEY, False, {}),
    },
}
CASES = [(section, field) for section, fields in FIELDS.items() for field in fields]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints without a tokenizer, two tokenizers, and the pairs in two orders."""
    folder = tmp_path_factory.mktemp("fields")
    make_tokenizer(folder / "tokenizer")
    make_tokenizer(folder / "coarse", vocabulary=260)
    for seed, name in enumerate(("model", "other")):
        make_checkpoint(folder / name, folder / "tokenizer", seed=seed)
        for path in (folder / name).glob("tokenizer*"):
            path.unlink()
    rows = transcripts(20)
    write_jsonl(folder / "pairs.jsonl", rows)
    write_jsonl(folder / "shuffled.jsonl", rows[::-1][:15])
    return folder


def request(place, **sections) -> Request:
    train = {
        "run_name": "f", "output_dir": place / "run", "batch_size": 4,
        "tokenizer_name": str(place / "tokenizer"),
    }  # fmt: skip
    data = {"dataset_name": str(place / "pairs.jsonl")}
    run = {"sft_checkpoint": str(place / "model")} | sections.get("run", {})
    if "tokenizer_name" in run:  # two that disagree are refused
        train["tokenizer_name"] = None
    if "dataset_name" in sections.get("train", {}):
        data = {}
    return Request(
        train=TrainingConfig(**(train | sections.get("train", {}))),
        dpo=DPOConfig(**({"max_length": 100} | sections.get("dpo", {}))),
        data=PreferenceDatasetConfig(**(data | sections.get("data", {}))),
        **run,
    )


@pytest.fixture(scope="module")
def filled(place, tmp_path_factory):
    """A store that holds the training pairs, filled by the settings that nothing was changed in."""
    cache = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERN_LLM_CACHE", str(cache))
        report = fill_reference(**given(request(place)))
    assert report["found"] == 0 and report["scored"] == report["needed"] == 40
    return cache, report


def given(request: Request) -> dict:
    return {
        "sft_checkpoint": request.sft_checkpoint,
        "train_config": request.train,
        "dpo_config": request.dpo,
        "preference_config": request.data,
        "tokenizer_name": request.tokenizer_name,
    }


def lacking(request: Request) -> tuple[int, int]:
    """How many answers would be scored, of how many."""
    missing = needed = 0
    with commands.opened(request, (1, 1)) as (_, references, *_):
        for wanted in references.pending:
            found = references.store.find(wanted.answers.keys, tokens=request.dpo.per_token)
            needed += len(wanted.answers)
            missing += len(wanted.answers) - len(found)
    return missing, needed


def test_every_field_is_classified():
    sections = {"train": TrainingConfig, "dpo": DPOConfig, "data": PreferenceDatasetConfig}
    for name, section in sections.items():
        fields = {field.name for field in dataclasses.fields(section)}
        assert fields == set(FIELDS[name]), f"classify these fields of {name} in this table"
    run = {field.name for field in dataclasses.fields(Request)} - set(sections)
    assert run == set(FIELDS["run"])


@pytest.mark.parametrize(("section", "field"), CASES)
def test_a_field_scores_again_exactly_what_it_changes(
    section, field, place, filled, tmp_path, monkeypatch
):
    kind, value, also = FIELDS[section][field]
    if kind is ELSEWHERE:
        return
    cache, report = filled
    shutil.copytree(cache, tmp_path / "cache")
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    if isinstance(value, str):
        store = report["store"].replace(str(cache), str(tmp_path / "cache"))
        value = value.format(place=place, digest=report["reference"], store=store)
    changed = request(place, **{section: {field: value} | also})
    missing, needed = lacking(changed)
    if kind is FREE:
        assert missing == 0, f"{section}.{field} scores again"
    elif kind is TOKENS:
        assert missing == needed
        fill_reference(**given(changed))
        again = request(place, dpo={"ld_alpha": 0.9})
        assert lacking(again) == (0, needed), "another weight of the same tokens scores nothing"
    else:
        assert missing > 0, f"{section}.{field} is served values of another setting"


def test_an_edited_row_alone_is_scored_again(place, filled, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(filled[0]))
    rows = transcripts(20)
    # One that nothing was cut from: where a shorter answer leaves more room, its prompt changes.
    row = min(rows, key=lambda row: len(row["chosen"] + row["rejected"]))
    row["rejected"] = row["rejected"].rpartition(":")[0] + ": dog."
    edited = write_jsonl(tmp_path / "edited.jsonl", rows)
    assert lacking(request(place, data={"dataset_name": str(edited)})) == (1, 40)


def test_other_weights_at_the_same_path_miss(place, filled, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(filled[0]))
    shutil.copytree(place / "model", tmp_path / "model")
    at_place = {"run": {"sft_checkpoint": str(tmp_path / "model")}}
    assert lacking(request(place, **at_place)) == (0, 40)
    shutil.copy(place / "other" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    assert lacking(request(place, **at_place)) == (40, 40)


def test_a_shorter_max_length_misses_where_prompts_are_long(place, filled, tmp_path, monkeypatch):
    """The named fault elsewhere: cut prompts served with the values of whole ones."""
    monkeypatch.setenv("MODERN_LLM_CACHE", str(filled[0]))
    short = request(place, dpo={"max_length": 60})
    with commands.opened(request(place), (1, 1)) as (_, whole, *_):
        lengths = whole.pending[0].answers
        longer = int((lengths.prompt_lengths + lengths.lengths > 60).sum())
    missing, needed = lacking(short)
    assert longer <= missing < needed
