"""A run resumed on 2, on 4 and again on 1 process equals an uninterrupted run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.helpers.forks import fork_server
from tests.helpers.text import transcripts, write_jsonl
from tests.helpers.zero import Case, dpo, numbers, stage, weights

MODULES = ("modern_llm.training.train_dpo", "tests.helpers.zero", "torch._dynamo")
STEPS = 12
# Processes, and the step (from 0) before which the run is interrupted.
CHAIN = ((1, 3), (2, 6), (4, 9), (1, None))


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("logs"), *MODULES) as server:
        yield server


def link(
    checkpoint: str, data: str, folder: str, number: int | None, break_at: int | None, seen: str
) -> None:
    """Run one part in a forked process; write down the examples of each step on this rank."""
    import torch.distributed as dist

    from modern_llm.training import loop

    real, rank = loop._optimizer_step, int(os.environ.get("RANK", "0"))

    def noted(*args):
        task, step = args[0].task, args[1]
        world = dist.get_world_size() if dist.is_initialized() else 1
        origins = [origin for part in task.origins(step) for origin in part]
        record = {"world": world, "origins": origins}
        Path(f"{seen}.{step}.{rank}").write_text(json.dumps(record))
        return real(*args)

    loop._optimizer_step = noted
    train = {"max_steps": STEPS, "save_every": 1}
    zero = None if number is None else stage(number)
    dpo(Path(checkpoint), Path(data), Case(Path(folder), zero, train, break_at=break_at))


def examples(seen: Path, world_of: dict[int, int]) -> list[list[str]]:
    """Return the examples of each step over all ranks; each rank reported its world size."""
    steps = []
    for step in range(STEPS):
        records = [
            json.loads(seen.with_name(f"{seen.name}.{step}.{rank}").read_text())
            for rank in range(world_of[step])
        ]
        assert {record["world"] for record in records} == {world_of[step]}, step
        steps.append(sorted(origin for record in records for origin in record["origins"]))
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [None, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2, 3))]
)
def test_one_two_four_and_one_again(tmp_path, forks, tiny_checkpoint, number):
    if number is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    data = write_jsonl(tmp_path / "p.jsonl", transcripts(45))

    def run(name: str, world: int, zero: int | None, break_at: int | None) -> None:
        args = (str(tiny_checkpoint), str(data), str(tmp_path / name), zero, break_at,
                str(tmp_path / f"{name}-seen"))  # fmt: skip
        for _ in range(3):  # another process may take the port
            # Under DeepSpeed a single process needs a launcher too.
            alone = world == 1 and zero is None
            jobs = [forks.start(link, *args)] if alone else forks.start_ranks(link, world, *args)
            for job in jobs:
                assert job.wait(150), [job.text[-2000:] for job in jobs]
            if not any("address already in use" in job.text.lower() for job in jobs):
                break
        assert [job.status for job in jobs] == [0] * world, [job.text[-2000:] for job in jobs]

    run("whole", 1, None, None)
    start, world_of = 0, {}
    for world, end in CHAIN:
        run("chain", world, number, end)
        world_of |= dict.fromkeys(range(start, end or STEPS), world)
        start = end or STEPS
    found = examples(tmp_path / "chain-seen", world_of)
    assert found == examples(tmp_path / "whole-seen", dict.fromkeys(range(STEPS), 1))
    assert all(len(step) == len(set(step)) for step in found) and len(found[0]) == 8
    chain, whole = numbers(tmp_path / "chain"), numbers(tmp_path / "whole")
    assert len(chain) == len(whole) == STEPS
    for step, (one, other) in enumerate(zip(chain, whole, strict=True)):
        assert one == pytest.approx(other, rel=1e-5), step  # loss, gradient norm, learning rate
    one, other = weights(tmp_path / "chain"), weights(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4
