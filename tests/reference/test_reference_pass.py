"""Cached, stored and model references give the same run; missing or wrong values are named."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modern_llm.cli import main
from modern_llm.config import PreferenceDatasetConfig, TrainingConfig
from modern_llm.config.errors import StorageError, UserError
from modern_llm.reference.commands import fill_reference
from modern_llm.reference.scoring import Scoring
from modern_llm.reference.store.store import ReferenceStore
from modern_llm.storage.lease import Claims
from modern_llm.training.train_dpo import DPOConfig, run_dpo
from tests.helpers.steps import broken_at
from tests.helpers.text import make_checkpoint, transcripts, write_jsonl


@pytest.fixture(scope="module")
def other(tmp_path_factory, tiny_tokenizer):
    """Other weights of the same architecture."""
    return make_checkpoint(tmp_path_factory.mktemp("other") / "model", tiny_tokenizer, seed=5)


def arguments(folder: Path, checkpoint: Path, pairs: Path, dpo: dict, **train) -> dict:
    fields = {
        "run_name": "r", "output_dir": folder, "batch_size": 5, "max_steps": 8, "log_every": 1,
        "learning_rate": 3e-3, "eval_every": 4,
    }  # fmt: skip
    return {
        "sft_checkpoint": checkpoint,
        "train_config": TrainingConfig(**(fields | train)),
        "dpo_config": DPOConfig(**({"max_length": 96} | dpo)),
        "preference_config": PreferenceDatasetConfig(dataset_name=str(pairs), eval_fraction=0.2),
    }


def run(folder: Path, checkpoint: Path, pairs: Path, dpo: dict, **train) -> list[dict]:
    run_dpo(**arguments(folder, checkpoint, pairs, dpo, **train))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "r_final" / "model.safetensors")


def assert_same_run(one: tuple[list[dict], Path], other: tuple[list[dict], Path]) -> None:
    assert [r["step"] for r in one[0]] == [r["step"] for r in other[0]]
    for a, b in zip(one[0], other[0], strict=True):
        for name in ("loss", "rewards/margins", "eval/loss"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), (a["step"], name)
    left, right = weights(one[1]), weights(other[1])
    assert max(float((left[n] - right[n]).abs().max()) for n in left) < 1e-5


@pytest.mark.parametrize(
    "dpo",
    [
        pytest.param({}, id="sums"),
        pytest.param({"ld_alpha": 0.4}, id="desensitised", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("same", [True, False], ids=["the policy's start", "other weights"])
def test_cached_stored_and_model_references_give_the_same_run(
    tmp_path, tiny_checkpoint, other, tiny_pairs, dpo, same
):
    named = dpo if same else dpo | {"reference_checkpoint": str(other)}
    runs = {}
    for how in ("cache", "store", "model"):
        folder = tmp_path / how
        runs[how] = run(folder, tiny_checkpoint, tiny_pairs, named | {"reference": how}), folder
    assert_same_run(runs["cache"], runs["model"])
    assert_same_run(runs["cache"], runs["store"])
    first = runs["cache"][0][0]["loss"]
    assert (abs(first - math.log(2)) < 1e-4) == same


def test_desensitised_sums_are_those_of_the_paper(tmp_path, tiny_checkpoint, other, tiny_pairs):
    """Every token's log-prob by plain forwards, weighted by hand, against the first step's loss."""
    alpha, beta = 0.3, 0.2
    dpo = {"ld_alpha": alpha, "beta": beta, "reference_checkpoint": str(other)}
    records = run(
        tmp_path / "run", tiny_checkpoint, tiny_pairs, dpo, batch_size=25, max_steps=1, eval_every=9
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    models = [AutoModelForCausalLM.from_pretrained(p) for p in (tiny_checkpoint, other)]
    from modern_llm.data.table.build import prepare_tables

    data = PreferenceDatasetConfig(dataset_name=str(tiny_pairs), eval_fraction=0.2)
    table = prepare_tables(data, tokenizer, tmp_path / "t", max_length=96).train
    losses = []
    for row in range(len(table)):
        ratios = []
        prompt = table.ids(row, "prompt").tolist()
        answers = [table.ids(row, side).tolist() for side in ("chosen", "rejected")]
        shared = min(map(len, answers))
        for answer in answers:
            weight = torch.tensor([1.0] * shared + [alpha] * (len(answer) - shared))
            ids = torch.tensor([prompt + answer])
            sums = []
            for model in models:
                with torch.no_grad():
                    logprobs = model(ids).logits[0, :-1].double().log_softmax(-1)
                tokens = logprobs.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
                sums.append(float((tokens * weight).sum()))
            ratios.append(sums[0] - sums[1])
        losses.append(math.log1p(math.exp(-beta * (ratios[0] - ratios[1]))))
    assert len(table) == 25
    assert records[0]["loss"] == pytest.approx(np.mean(losses), abs=1e-4)


@pytest.mark.slow
def test_training_without_the_references_weights(
    tmp_path, tiny_checkpoint, other, tiny_pairs, monkeypatch, caplog
):
    """A store that was shipped, and the digest of what it should be, are enough."""
    dpo = {"reference_checkpoint": str(other)}
    filled = fill_reference(**arguments(tmp_path / "x", tiny_checkpoint, tiny_pairs, dpo))
    expected = run(tmp_path / "here", tiny_checkpoint, tiny_pairs, dpo), tmp_path / "here"
    shipped = tmp_path / "shipped"
    shutil.move(filled["store"], shipped)
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "empty"))
    told = {"reference": "store", "reference_digest": filled["reference"][:20]}
    with pytest.raises(StorageError, match="no store holds values of these weights"):
        run(tmp_path / "none", tiny_checkpoint, tiny_pairs, told)
    told["reference_store"] = str(shipped)
    caplog.set_level(logging.INFO, logger="modern_llm")
    there = run(tmp_path / "there", tiny_checkpoint, tiny_pairs, told), tmp_path / "there"
    assert_same_run(expected, there)
    assert "its weights are not available" in caplog.text
    told["reference_digest"] = "0" * 16
    with pytest.raises(StorageError, match=f"holds {filled['reference'][:16]}"):
        run(tmp_path / "wrong", tiny_checkpoint, tiny_pairs, told)
    with pytest.raises(StorageError, match="holds values of other weights"):
        run(
            tmp_path / "weights", tiny_checkpoint, tiny_pairs,
            {"reference": "store", "reference_store": str(shipped)},
        )  # fmt: skip


def test_a_store_that_lacks_something_is_refused_before_a_model_is_loaded(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    fill_reference(**arguments(tmp_path / "x", tiny_checkpoint, tiny_pairs, {}))
    more = write_jsonl(tmp_path / "more.jsonl", transcripts(30) + transcripts(2, seed=77))
    monkeypatch.setattr("modern_llm.setup.policy.load_to_shard", None)
    with pytest.raises(StorageError, match=r"lacks 4 of .* the first at .*more.jsonl:31; fill it"):
        run(tmp_path / "run", tiny_checkpoint, more, {"reference": "store"})
    assert not (tmp_path / "run").exists()


def test_a_place_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("modern_llm.setup.policy.load_to_shard", None)
    with pytest.raises(StorageError, match="reference store .* cannot write"):
        run(tmp_path / "run", tiny_checkpoint, tiny_pairs, {})


def test_a_complete_store_is_used_where_nothing_can_be_written(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    fill_reference(**arguments(tmp_path / "x", tiny_checkpoint, tiny_pairs, {}))

    def refused(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    for name in ("_write", "_write_manifest", "check_space"):
        monkeypatch.setattr(ReferenceStore, name, refused)
    make = Claims._make

    def elsewhere(self, path):  # the run's own folder can be written
        return make(self, path) if path.parent == tmp_path / "run" else refused()

    monkeypatch.setattr(Claims, "_make", elsewhere)
    assert run(tmp_path / "run", tiny_checkpoint, tiny_pairs, {})[0]["loss"] > 0


def test_a_pass_that_runs_out_of_room_keeps_its_shards_and_goes_on(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch
):
    call = arguments(tmp_path / "x", tiny_checkpoint, tiny_pairs, {"flush_every": 4})
    real, calls = ReferenceStore._write, []

    def sometimes(self, layout, chunks):
        calls.append(1)
        if len(calls) == 3:
            raise self._refused(OSError(28, "No space left on device"), 1 << 60)
        return real(self, layout, chunks)

    monkeypatch.setattr(ReferenceStore, "_write", sometimes)
    with pytest.raises(StorageError, match=r"No space left on device; \d+\.\d MB are missing"):
        fill_reference(**call)
    report = fill_reference(**call)
    assert 0 < report["found"] < report["needed"]
    assert report["found"] + report["scored"] == report["needed"]


def test_no_value_that_is_not_finite_is_written(tmp_path, tiny_checkpoint, tiny_pairs):
    bad = tmp_path / "bad"
    shutil.copytree(tiny_checkpoint, bad)
    tensors = load_file(bad / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].clone()
    # A token of one pair only: the others are scored and kept.
    (token,) = AutoTokenizer.from_pretrained(tiny_checkpoint)("~")["input_ids"]
    rows = transcripts(30)
    rows[12]["rejected"] += "~"
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    embedding[token] = float("inf")
    save_file(tensors | {"model.embed_tokens.weight": embedding}, bad / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    call = arguments(tmp_path / "x", bad, pairs, {"flush_every": 2})
    fill_reference(**call)
    (folder,) = (tmp_path / "reference-cache" / "references").iterdir()
    store = ReferenceStore.open(folder)
    assert len(store) > 0 and len(store.marks.keys()) == 1
    for shard in store.shards:
        assert np.isfinite(shard.rows(0, len(shard), tokens=False).sums).all()


def test_after_a_resume_the_original_reference_is_asked(
    tmp_path, tiny_checkpoint, tiny_pairs, own_reference_cache
):
    whole = run(tmp_path / "whole", tiny_checkpoint, tiny_pairs, {}, save_every=2)
    with broken_at(5), pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", tiny_checkpoint, tiny_pairs, {}, save_every=2)
    shutil.rmtree(own_reference_cache)  # all values are lost: they must be made again
    again = run(tmp_path / "run", tiny_checkpoint, tiny_pairs, {}, save_every=2)
    assert [r["loss"] for r in again] == [r["loss"] for r in whole]


def test_a_loss_without_reference_computes_nothing(
    tmp_path, tiny_checkpoint, tiny_pairs, monkeypatch, own_reference_cache
):
    monkeypatch.setattr(Scoring, "__call__", None)
    run(tmp_path / "run", tiny_checkpoint, tiny_pairs, {"loss_type": "simpo"})
    assert not (own_reference_cache / "references").exists()
    with pytest.raises(UserError, match="reads no reference: there is nothing to fill"):
        call = arguments(tmp_path / "x", tiny_checkpoint, tiny_pairs, {"loss_type": "simpo"})
        fill_reference(**call)


@pytest.mark.parametrize(
    ("dpo", "problem"),
    [
        ({"reference_digest": "a" * 16}, "with reference: store alone"),
        ({"reference_store": "x"}, "with reference: store alone"),
        ({"reference": "model", "flush_every": 3}, "no effect with reference: model"),
        ({"reference": "store", "flush_every": 3}, "no effect with reference: store"),
        ({"loss_type": "simpo", "reference": "model"}, "reads no reference"),
        ({"loss_type": "ipo", "ld_alpha": 0.5}, "divides by the lengths"),
        ({"ld_alpha": 1.0}, "less than 1"),
        (
            {"reference": "store", "reference_digest": "a" * 16, "reference_checkpoint": "x"},
            "both name the reference",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(dpo, problem):
    with pytest.raises(ValueError, match=problem):
        DPOConfig(**dpo)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, tiny_checkpoint, tiny_pairs):
    import yaml

    folder = tmp_path_factory.mktemp("verbs")
    call = arguments(folder / "run", tiny_checkpoint, tiny_pairs, {"flush_every": 3})
    content = {
        "sft_checkpoint": str(tiny_checkpoint),
        "train": {"run_name": "r", "output_dir": str(folder / "run"), "batch_size": 5},
        "dpo": {"max_length": 96, "flush_every": 3},
        "data": {
            k: v
            for k, v in dataclasses.asdict(call["preference_config"]).items()
            if k in ("dataset_name", "eval_fraction")
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def said(capsys, *words) -> dict:
    assert main(["reference", *map(str, words), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_verbs(settings, tmp_path, monkeypatch, capsys, tiny_checkpoint):
    """Parts by independent jobs, joined, told about, verified, pruned, and used for training."""
    stores = []
    for k in (1, 2, 3):
        monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / f"part{k}"))
        report = said(capsys, "fill", "--config", settings, "--part", f"{k}/3")
        assert report["scored"] == report["needed"] < 60
        stores.append((report["store"], report["needed"]))
    assert sum(needed for _, needed in stores) == 60
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "all"))
    joined = said(capsys, "merge", *[w for s, _ in stores for w in ("--sources", s)])
    assert joined["rows"] == 60 and joined["shards"] == 1
    report = said(capsys, "fill", "--config", settings)
    assert (report["found"], report["scored"]) == (60, 0)
    (told,) = said(capsys, "info")["stores"]
    assert told["reference"] == report["reference"] and told["rows"] == 60
    assert json.loads(told["recipe"])["compute"] == "float32"
    assert told["bytes"] == sum(p.stat().st_size for p in Path(told["store"]).glob("shard-*"))
    checked = said(capsys, "verify", "--config", settings, "--sample", "20")
    assert checked["rescored"] == 20 and checked["largest_difference"] < 1e-5

    # As an undisturbed fill: the parts were the same forwards.
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "alone"))
    alone = ReferenceStore.open(Path(said(capsys, "fill", "--config", settings)["store"]))
    keys = np.concatenate([s.rows(0, len(s), tokens=False).keys for s in alone.shards])
    one, other = alone.find(keys), ReferenceStore.open(Path(joined["store"])).find(keys)
    assert len(one) == 60 and (one.keys == other.keys).all() and (one.sums == other.sums).all()

    words = ["--config", settings, "--data.max_examples", "10"]
    (pruned,) = said(capsys, "prune", *words)["stores"]
    assert pruned["rows"] == 20 and pruned["shards"] == 1
    shard = next(Path(pruned["store"]).glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[-40] ^= 4
    shard.write_bytes(content)
    assert main(["reference", "verify", "--store", pruned["store"]]) == 3
    assert shard.name in capsys.readouterr().err
    assert said(capsys, "prune", "--store", pruned["store"])["stores"][0]["removed"] == 1


def test_stores_of_different_weights_are_not_joined(settings, tmp_path, monkeypatch, capsys, other):
    stores = []
    for words in ([], ["--dpo.reference_checkpoint", other]):
        monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / str(len(stores))))
        stores.append(said(capsys, "fill", "--config", settings, *words)["store"])
    assert main(["reference", "merge", "--sources", stores[0], "--sources", stores[1]]) == 2
    assert "only values of the same weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fill", "--part", "4/3"], "part 4/3"),
        (["fill", "--part", "0/3"], "part"),
        (["fill", "--dpo.reference", "model"], "filled with dpo.reference: cache"),
        (["fill", "--resume"], "resume has no effect"),
        (["verify", "--store", "nowhere"], "both name a store"),
    ],
)
def test_bad_usage_of_the_verbs_is_one_line(settings, words, part, capsys):
    if "--dpo.reference" in words:
        words += ["--dpo.flush_every", "2048"]
    assert main(["reference", words[0], "--config", str(settings), *words[1:]]) == 2
    assert part in capsys.readouterr().err


def test_a_verb_of_the_group_is_asked_for(capsys):
    assert main(["reference"]) == 2
    assert main(["reference", "--help"]) == 0
    assert "reference prune" in capsys.readouterr().out
    assert main(["reference", "fil"]) == 2
    assert "did you mean reference fill?" in capsys.readouterr().err
