"""KTO runs equal a plain loop with two models, in any micro-batch, world size and resume."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from modern_llm.config import LoraConfig
from tests.helpers.kto import (
    BATCH,
    BETA,
    LENGTH,
    RATE,
    ROWS,
    SEED,
    STEPS,
    WEIGHTS,
    labelled,
    make_inputs,
    our_run,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import write_jsonl
from tests.helpers.zero import stage, use_deepspeed

SETTINGS = {"one a forward": {"micro_batch_size": 1}, "large": {"tokens_per_micro_batch": 2000}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("kto"))


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
