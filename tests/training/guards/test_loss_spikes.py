"""A step with a loss spike is skipped by all ranks; the statistics survive a restart."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError
from modern_llm.training.guards.loss_spikes import WARM, judge
from modern_llm.training.guards.state import no_spikes
from tests.helpers.forks import fork_server
from tests.helpers.small import MODULES, numbers, run_small
from tests.training.test_fault_campaign import final, start

SETTINGS = {
    "max_steps": 40, "save_every": 1, "keep_checkpoints": 40, "skip_loss_spikes": 4.0,
    "schedule": "constant", "loud": (30,),
}  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("logs"), *MODULES) as server:
        yield server


def noise(count: int, level: float = 1.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(level, 0.1) for _ in range(count)]


def test_a_spike_is_skipped_and_does_not_change_the_statistics():
    state = no_spikes()
    assert not any(judge(state, loss, 6) for loss in noise(200))
    assert state["mean"] == pytest.approx(1.0, abs=0.05)
    assert math.sqrt(state["variance"]) == pytest.approx(0.1, rel=0.3)
    before = dict(state)
    assert judge(state, 3.0, 6)
    assert state == before | {"skipped": 1, "in_a_row": 1}
    assert not judge(state, 1.0, 6) and state["in_a_row"] == 0
    # A non-finite loss is not a spike, and a low one is not either.
    before = dict(state)
    assert not judge(state, math.nan, 6) and not judge(state, math.inf, 6) and state == before
    assert not judge(state, -5.0, 6)


def test_the_first_steps_are_only_observed_and_a_new_level_is_followed():
    state = no_spikes()
    assert not any(judge(state, loss, 6) for loss in [*noise(WARM - 1), 50.0])
    state = no_spikes()
    for loss in noise(100):
        judge(state, loss, 6)
    assert [judge(state, loss, 6) for loss in noise(6, level=4.0)] == [True, True] + [False] * 4
    assert state["skipped"] == 2
    constant = no_spikes()
    assert not any(judge(constant, 1.0, 6) for _ in range(50)) and not judge(constant, 1.1, 6)


def weights(folder: Path, step: int) -> bytes:
    return (folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_update_of_a_spike_is_not_applied_and_a_restart_decides_the_same(
    tmp_path, forks, caplog
):
    run_small(tmp_path / "whole", **SETTINGS)
    whole = logged(tmp_path / "whole")
    assert whole[30]["loss"] > 10 * whole[29]["loss"]
    assert ["skipped_spikes" in record for record in whole] == [False] * 30 + [True] * 10
    assert {record["skipped_spikes"] for record in whole[30:]} == {1}
    (told,) = [r.getMessage() for r in caplog.records if "its loss" in r.getMessage()]
    assert told.startswith("warning: step 31: its loss") and "4 standard deviations" in told
    applied = [weights(tmp_path / "whole", step) != weights(tmp_path / "whole", step + 1)
               for step in range(1, 39)]  # fmt: skip
    assert [step for step, moved in enumerate(applied, 1) if not moved] == [30]

    killed = tmp_path / "killed"
    fault = "loader.before:0:29:kill"
    assert start(forks, killed, 1, fault, None, "", SETTINGS) == [-9]
    assert start(forks, killed, 1, "", None, "", SETTINGS) == [0], forks.jobs[-1].text
    assert numbers(killed)[:30] == numbers(tmp_path / "whole")[:30]
    assert (
        numbers(killed)[31:] == numbers(tmp_path / "whole")[31:]
    )  # the gradient norm of step 31 is NaN
    assert final(killed) == final(tmp_path / "whole")
    state = json.loads((killed / "checkpoints" / "step-00000039" / "state.json").read_text())
    assert state["spikes"]["skipped"] == 1 and state["spikes"]["count"] == 38

    off = tmp_path / "off"
    assert start(forks, off, 1, "", None, "", SETTINGS | {"skip_loss_spikes": 0.0}) == [0]
    assert final(off) != final(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2])
def test_two_processes_decide_as_one(tmp_path, forks, stage):
    if stage is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    assert start(forks, tmp_path / "one", 1, "", None, "", SETTINGS) == [0], forks.jobs[-1].text
    found = start(forks, tmp_path / "two", 2, "", stage, "", SETTINGS)
    assert found == [0, 0], forks.jobs[-1].text
    # The skipped step is logged although no line is due.
    rare = SETTINGS | {"log_every": 100, "save_every": 39}
    assert start(forks, tmp_path / "rare", 2, "", stage, "", rare) == [0, 0], forks.jobs[-1].text
    assert [(r["step"], r.get("skipped_spikes")) for r in logged(tmp_path / "rare")] == [
        (1, None), (31, 1), (40, 1),
    ]  # fmt: skip
    facts = json.loads(
        (tmp_path / "two" / "checkpoints" / "step-00000039" / "MANIFEST.json").read_text()
    )["facts"]
    assert facts["world"] == 2
    assert logged(tmp_path / "two")[-1]["skipped_spikes"] == 1
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two.get("skipped_spikes") == one.get("skipped_spikes")
    one, two = (load_file(tmp_path / n / "r_final" / "model.safetensors") for n in ("one", "two"))
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_with_a_loss_scaler_it_is_refused(tmp_path):
    with pytest.raises((ConfigError, ValueError), match="skip_loss_spikes.*fp16"):
        TrainingConfig(
            run_name="x", output_dir=tmp_path, skip_loss_spikes=6, mixed_precision="fp16"
        )
