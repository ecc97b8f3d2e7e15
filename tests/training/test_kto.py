"""KTO runs equal a plain loop with two models, in any micro-batch, world size and resume."""

from __future__ import annotations

import json
import math
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from modern_llm.config import LabelledDatasetConfig, LoraConfig, TrainingConfig
from modern_llm.config.errors import DataError, StorageError
from modern_llm.setup.labelled import imbalance
from modern_llm.training.train_kto import KTOConfig, run_kto
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl
from tests.helpers.zero import stage, use_deepspeed

ROWS, BATCH, SEED, STEPS, RATE, LENGTH = 21, 6, 7, 7, 2e-3, 64
BETA, WEIGHTS = 0.3, (1.5, 0.75)
SETTINGS = {"one a forward": {"micro_batch_size": 1}, "large": {"tokens_per_micro_batch": 2000}}


def labelled(count: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for number, row in enumerate(transcripts(count, seed)):
        prompt, _, answer = row["chosen"].rpartition("Assistant:")
        # Every third row has the prompt of the row before it.
        prompt = rows[-1]["prompt"] if number % 3 == 2 else f"{prompt}Assistant:"
        rows.append({"prompt": prompt, "completion": answer, "label": rng.random() < 0.8})
    return rows


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kto")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    return checkpoint, write_jsonl(folder / "rows.jsonl", labelled(ROWS))


def plain_loop(checkpoint: Path, data: Path, loss_type: str = "kto") -> list[dict]:
    """KTO as a plain loop over whole steps with full logits; the metrics of every step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2)
    )
    rows = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        p, c = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        c.append(tokenizer.eos_token_id)
        p = p[-max(LENGTH // 2, LENGTH - len(c)) :]
        rows.append((p, c[: LENGTH - len(p)], row["label"]))
    numbers = {text: at for at, text in enumerate(dict.fromkeys(str(p) for p, *_ in rows))}

    def order(epoch):
        key = np.array([SEED, epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key)).permutation(len(rows)).tolist()

    first = order(0)
    other = {}
    for start in range(0, len(rows), BATCH):
        step = first[start : start + BATCH]
        for at, row in enumerate(step):
            before = [step[at - k] for k in range(1, len(step))]
            far = [first[first.index(row) - k] for k in range(1, len(first))]
            mine = numbers[str(rows[row][0])]
            other[row] = next(j for j in before + far if numbers[str(rows[j][0])] != mine)

    def total(model, pairs):
        sums = []
        for p, c in pairs:
            logits = model(torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
            sums.append(logits.log_softmax(-1)[range(len(c)), c].sum())
        return torch.stack(sums)

    matrices = [p for p in policy.parameters() if p.ndim >= 2]
    vectors = [p for p in policy.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95), lr=RATE,
    )  # fmt: skip
    found, per_epoch = [], math.ceil(len(rows) / BATCH)
    for number in range(STEPS):
        epoch, within = divmod(number, per_epoch)
        batch = order(epoch)[within * BATCH : (within + 1) * BATCH]
        pairs = [rows[i][:2] for i in batch]
        crossed = [
            (p, rows[other[i]][1][: LENGTH - len(p)])
            for i, (p, _) in zip(batch, pairs, strict=True)
        ]
        with torch.no_grad():
            kl = (total(policy, crossed) - total(reference, crossed)).mean().clamp(min=0)
            frozen = total(reference, pairs)
        r = total(policy, pairs) - frozen
        good = torch.tensor([rows[i][2] for i in batch])
        kl = kl if loss_type == "kto" else torch.zeros(())
        margin = torch.where(good, BETA * (r - kl), BETA * (kl - r))
        loss = ((1 - margin.sigmoid()) * torch.where(good, *WEIGHTS)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        metrics = {"loss": loss.item(), "rewards/chosen": (BETA * r[good]).mean().item()}
        found.append(metrics | ({"kl": kl.item()} if loss_type == "kto" else {}))
    return found


def settings(folder: Path, **changes) -> TrainingConfig:
    options = {
        "run_name": "k", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": RATE, "schedule": "constant", "weight_decay": 0.05, "log_every": 1,
        "seed": SEED,
    }  # fmt: skip
    return TrainingConfig(**(options | changes))


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def our_run(checkpoint, data, folder, kto=(), lora=None, **changes) -> list[dict]:
    options = {"max_length": LENGTH, "beta": BETA} | dict(kto)
    options |= {"desirable_weight": WEIGHTS[0], "undesirable_weight": WEIGHTS[1]}
    run_kto(
        checkpoint,
        settings(folder, **changes),
        KTOConfig(**options),
        LabelledDatasetConfig(dataset_name=str(data)),
        lora_config=lora,
    )
    return records(folder)


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted) == STEPS
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs.items():
            if not math.isnan(value):  # a step without a desirable row
                assert ours[name] == pytest.approx(value, abs=2e-4), (ours["step"], name)


def on_a_rank(checkpoint, data, folder) -> dict:
    import torch.distributed as dist

    results = {
        name: our_run(checkpoint, data, folder / name, **given) for name, given in SETTINGS.items()
    }
    assert dist.get_world_size() == 2
    live = our_run(checkpoint, data, folder / "live", {"reference": "model"})
    resumed = our_run(checkpoint, data, folder / "resumed", save_every=2)
    for number in (2, 3) if find_spec("deepspeed") else ():
        use_deepspeed(stage(number), folder)
        results[f"ZeRO-{number}"] = our_run(checkpoint, data, folder / f"zero{number}")
    return results | {"live": live, "resumed": resumed}


def test_a_run_equals_a_plain_loop(inputs, tmp_path):
    plain = plain_loop(*inputs)
    assert plain[0]["kl"] == 0
    assert max(step["kl"] for step in plain) > 0.05, "a KL of 0 would show nothing"
    for name, given in SETTINGS.items():
        assert_same(our_run(*inputs, tmp_path / name, **given), plain)


def test_apo_zero_unpaired_equals_a_plain_loop_and_scores_no_mismatched_response(
    inputs, tmp_path, caplog
):
    plain = plain_loop(*inputs, "apo_zero_unpaired")
    found = our_run(*inputs, tmp_path / "apo", {"loss_type": "apo_zero_unpaired"})
    assert_same(found, plain)
    assert "kl" not in found[0]


@pytest.mark.slow
def test_two_processes_equal_a_plain_loop_from_the_start_and_after_a_resume_from_one(
    inputs, tmp_path
):
    plain = plain_loop(*inputs)
    with pytest.raises(KeyboardInterrupt), broken_at(5):
        our_run(*inputs, tmp_path / "two" / "resumed", save_every=2)
    for rank in run_ranks(on_a_rank, 2, *inputs, tmp_path / "two", timeout=280):
        for found in rank.values():
            assert_same(found, plain)


@pytest.mark.slow
def test_a_live_reference_gives_what_the_store_gives(inputs, tmp_path):
    stored = our_run(*inputs, tmp_path / "cache")
    live = our_run(*inputs, tmp_path / "live", {"reference": "model"})
    again = our_run(*inputs, tmp_path / "store", {"reference": "store"})
    for a, b, c in zip(stored, live, again, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["kl"] == pytest.approx(a["kl"], abs=1e-4)
        assert (c["loss"], c["kl"]) == (a["loss"], a["kl"])


def test_a_store_that_lacks_a_mismatched_response_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    our_run(*inputs, tmp_path / "apo", {"loss_type": "apo_zero_unpaired"}, max_steps=1)
    with pytest.raises(StorageError, match=r"kto.reference: store: .* lacks \d+ of \d+ answers"):
        our_run(*inputs, tmp_path / "kto", {"reference": "store"})


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(inputs, tmp_path):
    whole = our_run(*inputs, tmp_path / "whole", save_every=2)
    with pytest.raises(KeyboardInterrupt), broken_at(4):
        our_run(*inputs, tmp_path / "broken", save_every=2)
    found = our_run(*inputs, tmp_path / "broken", save_every=2)
    for a, b in zip(whole, found, strict=True):
        assert {n: a[n] for n in ("loss", "kl", "grad_norm")} == {
            n: b[n] for n in ("loss", "kl", "grad_norm")
        }


@pytest.mark.slow
def test_appended_rows_join_with_partners_among_themselves(inputs, tmp_path):
    checkpoint, data = inputs
    grown = write_jsonl(tmp_path / "grown.jsonl", labelled(ROWS))
    options = {"save_every": 2, "max_steps": 12}
    with pytest.raises(KeyboardInterrupt), broken_at(3):
        our_run(checkpoint, grown, tmp_path / "run", **options)
    write_jsonl(grown, [*labelled(ROWS), *labelled(9, seed=8)])
    found = our_run(checkpoint, grown, tmp_path / "run", accept_change=True, **options)
    whole = our_run(checkpoint, data, tmp_path / "whole", max_steps=12)
    # Steps of the first epoch, of 21 rows, are those of a run without the new rows.
    assert [r["kl"] for r in found[:4]] == [r["kl"] for r in whole[:4]]
    assert len(found) == 12 and found[-1]["examples"] == 21 + 30 + 3 * BATCH


@pytest.mark.slow
def test_adapters_are_compared_with_the_model_without_them(inputs, tmp_path):
    found = our_run(*inputs, tmp_path / "lora", lora=LoraConfig(rank=4))
    assert found[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert found[0]["rewards/rejected"] == pytest.approx(0, abs=1e-5)
    assert abs(found[-1]["rewards/margins"]) > 0.01


def test_evaluation_uses_every_row_once(inputs, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", labelled(13, seed=3))
    checkpoint, data = inputs
    run_kto(
        checkpoint,
        settings(tmp_path / "run", max_steps=2, eval_every=1),
        KTOConfig(max_length=LENGTH),
        LabelledDatasetConfig(dataset_name=str(data), eval_dataset_name=str(held_out)),
    )
    first, last = records(tmp_path / "run")
    labels = [row["label"] for row in labelled(13, seed=3)]
    assert last["eval/desirable"] == pytest.approx(sum(labels) / 13)
    names = ("loss", "kl", "rewards/chosen", "rewards/rejected", "rewards/margins")
    assert all(f"eval/{name}" in last for name in names)
    assert first["eval/loss"] != last["eval/loss"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([row | {"label": True} for row in labelled(12)], "all 12 training rows are labelled desi"),
        ([row | {"prompt": "Why?"} for row in labelled(12)], "the same prompt"),
        (labelled(1), "1 training rows are labelled|1 examples are left"),
    ],
)
def test_data_that_kto_cannot_use_is_refused_before_a_model_is_loaded(
    inputs, tmp_path, rows, message, monkeypatch
):
    from modern_llm.setup import scorers

    monkeypatch.setattr(scorers, "load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(DataError, match=message):
        our_run(inputs[0], data, tmp_path / "run")


def test_weights_that_do_not_balance_the_labels_are_advised():
    class Table:
        train = type("T", (), {"values": lambda self, name: np.array([1.0] * 30 + [0.0] * 10)})()

    advice = imbalance(KTOConfig(), Table())
    assert advice is not None and "kto.undesirable_weight of 2.25 to 3" in advice
    assert imbalance(KTOConfig(undesirable_weight=2.5), Table()) is None
    low = imbalance(KTOConfig(undesirable_weight=6), Table())
    assert low is not None and "kto.desirable_weight of 2 to 2.67" in low


def test_the_verb_takes_a_file_and_a_dry_run_keeps_nothing(inputs, tmp_path, capsys, monkeypatch):
    from modern_llm.cli import main

    checkpoint, data = inputs
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    train = {"run_name": "k", "output_dir": "run", "batch_size": 4, "max_steps": 2}
    sections = {"train": train, "data": {"dataset_name": str(data)}, "kto": {"max_length": LENGTH}}
    file.write_text(json.dumps({"sft_checkpoint": str(checkpoint), **sections}))
    assert main(["kto", str(file), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["forward_backward"]["metrics"]["loss"] == pytest.approx(0.5)
    assert result["data"]["examples"] == ROWS and not (tmp_path / "run").exists()
    assert main(["inspect", "--config", str(file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["kind"], result["max_length"], result["batch_size"]) == ("labelled", LENGTH, 4)
    assert result["sources"][0]["values"]["label"]["rows"] == ROWS
    assert main(["plan", "--config", str(file), "--json"]) == 0
    capsys.readouterr()
    assert main(["kto", str(file), "--kto.undesirable_weight", "-1"]) == 2
    assert "kto.undesirable_weight" in capsys.readouterr().err


def test_a_finished_run_has_a_card_and_a_page_with_its_kl(inputs, tmp_path):
    from modern_llm.report.card import model_card

    our_run(*inputs, tmp_path / "run", max_steps=2)
    card = model_card(tmp_path / "run")
    assert "- kto" in card and "Trained by modern-llm: kto" in card and "KL divergence" in card
    assert "KL divergence from the reference" in (tmp_path / "run" / "report.html").read_text()


def test_the_function_of_one_call_reads_rows_from_memory(inputs, tmp_path):
    import modern_llm as ml

    rows = labelled(12)
    options = {"max_steps": 1, "batch_size": 4, "max_length": LENGTH, "undesirable_weight": 2.0}
    final = ml.kto(str(inputs[0]), rows, output_dir=tmp_path / "run", **options)
    assert final.name == "kto_final"
    assert records(tmp_path / "run")[0]["examples"] == 4


def test_reference_fill_scores_what_a_run_with_the_store_needs(
    inputs, tmp_path, capsys, monkeypatch
):
    from modern_llm.cli import main

    checkpoint, data = inputs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    train = {"run_name": "k", "output_dir": "run", "batch_size": BATCH, "seed": SEED}
    sections = {"train": train, "data": {"dataset_name": str(data)}, "kto": {"max_length": LENGTH}}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"sft_checkpoint": str(checkpoint), **sections}))
    found = {"needed": 0}
    for part in ("1/2", "2/2"):
        assert main(["reference", "fill", str(file), "--part", part, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found["needed"] += result["needed"]
    assert ROWS < found["needed"] <= 2 * ROWS
    our_run(checkpoint, data, tmp_path / "run", {"reference": "store"}, max_steps=2)
    words = ["--sft_checkpoint", str(checkpoint), "--kto.reference", "model"]
    assert main(["reference", "fill", str(file), *words]) == 2
    assert "kto.reference: model: a store is filled" in capsys.readouterr().err


def test_a_row_whose_value_is_not_finite_is_left_out_and_listed(inputs, tmp_path, monkeypatch):
    from modern_llm.reference.reference_pass import ReferencePass

    real = ReferencePass.compute

    def spoiled(self, policy):
        values = real(self, policy)
        values["training responses"][3, 1] = np.nan
        return values

    monkeypatch.setattr(ReferencePass, "compute", spoiled)
    found = our_run(*inputs, tmp_path / "run", max_steps=4)
    assert found[-1]["examples"] == ROWS - 1
    (line,) = (tmp_path / "run" / "data" / "dropped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["origin"].endswith(":4")


def test_an_order_by_length_pairs_rows_within_its_own_steps(inputs, tmp_path):
    from transformers import AutoTokenizer

    from modern_llm.setup.labelled import read_labelled, with_others
    from modern_llm.setup.micro_batches import order_of

    checkpoint, data = inputs
    section = LabelledDatasetConfig(dataset_name=str(data), order="length")
    kto, train = KTOConfig(max_length=LENGTH), settings(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prepared = with_others(train, kto, read_labelled(section, tokenizer, kto, tmp_path / "t"))
    order = order_of(train, ROWS, by="length", keys=prepared.order_keys())
    for number in range(ROWS // BATCH):
        step = set(order.step(number).tolist())
        assert {int(prepared.train.others[row]) for row in step} <= step
