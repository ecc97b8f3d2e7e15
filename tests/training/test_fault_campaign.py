"""For each fault point x rank x {kill, raise, no space}: one checkpoint verifies, and the same
command resumes to the same result."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from modern_llm.storage.atomic import TEMPORARY, verified_manifest
from modern_llm.training.checkpointing import format
from tests.helpers.forks import fork_server
from tests.helpers.small import MODULES, STEPS, child, numbers

ACTIONS = {"kill": {-9}, "raise": {0, 1}, "enospc": {0, 3}}
# Points reached while a run saves, commits and ends; the others are tested with their modules.
SAVING = {
    "folder.make", "state.write", "tensors.write", "file.flush", "manifest.write", "folder.flush",
    "commit.rename", "retire", "text.write", "file.rename", "metrics.append", "probe.write",
    "claim.write", "claim.link",
}  # fmt: skip


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("logs"), *MODULES) as server:
        yield server


def start(forks, folder: Path, world: int, *args) -> list[int]:
    """Run the child on `world` processes; return the status of each."""
    for _ in range(3):
        jobs = (
            [forks.start(child, str(folder), *args)]
            if world == 1
            else forks.start_ranks(child, world, str(folder), *args)
        )
        for job in jobs:
            assert job.wait(60), job.text
        if not any("address already in use" in job.text.lower() for job in jobs):
            break
    return [job.status for job in jobs]


class Campaign:
    """The uninterrupted run of one kind, and the fault points that it reaches."""

    def __init__(self, forks, folder: Path, world: int = 1, stage: int | None = None, **settings):
        self.forks, self.folder, self.world, self.stage = forks, folder, world, stage
        self.settings = settings
        folder.mkdir(exist_ok=True)
        self.whole = folder / "whole"
        log = str(folder / "points")
        found = start(forks, self.whole, world, "", stage, log, settings)
        assert found == [0] * world, [job.text for job in forks.jobs]
        self.points = [Counter(Path(f"{log}.{rank}").read_text().split()) for rank in range(world)]

    def cases(self, actions=tuple(ACTIONS)) -> list[tuple[str, int, int, str]]:
        """(point, rank, nth, action); the occurrence in the middle of the run is used."""
        return [
            (point, rank, (count + 2) // 2, action)
            for rank, points in enumerate(self.points)
            for point, count in sorted(points.items())
            for action in actions
            if not (action == "enospc" and point.startswith("collective"))
        ]

    def check(self, case: tuple[str, int, int, str]) -> None:
        point, rank, nth, action = case
        folder = self.folder / "case"
        for path in self.folder.glob("case*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        fault = f"{point}:{rank}:{nth}:{action}"
        found = start(self.forks, folder, self.world, fault, self.stage, "", self.settings)
        assert found[rank] in ACTIONS[action], (case, found, self.forks.jobs[-1].text)
        intact = verifying(folder)
        saved = folder.with_suffix(".saved")
        before = max(map(int, saved.read_text().split())) if saved.exists() else 0
        assert max(intact, default=0) >= before, f"{case}: the checkpoint of step {before} is lost"

        again = start(self.forks, folder, self.world, "", self.stage, "", self.settings)
        assert again == [0] * self.world, (case, found, again, self.forks.jobs[-1].text)
        assert numbers(folder) == numbers(self.whole), case
        assert final(folder) == final(self.whole), case
        kept = verifying(folder)  # after a failed save the older checkpoint is still there
        assert len(kept) == 2 and max(kept) == STEPS - 1, case
        assert STEPS - 2 in kept or action == "enospc", case
        left = [p for p in folder.rglob("*") if p.name.startswith(TEMPORARY)]
        assert not [p for p in left if p.parent.name == "checkpoints"], (case, left)


def final(folder: Path) -> bytes:
    verified_manifest(folder / "r_final")
    return (folder / "r_final" / "model.safetensors").read_bytes()


def verifying(folder: Path) -> set[int]:
    """Return the steps of the checkpoints; each must verify."""
    places = list((folder / "checkpoints").glob("step-*"))
    for place in places:
        verified_manifest(place)
    if places:
        assert format.newest(folder / "checkpoints")[1]["step"] == max(
            int(p.name[5:]) for p in places
        )
    return {int(place.name[5:]) for place in places}


@pytest.mark.slow
def test_every_point_of_saving_in_one_process(tmp_path, forks):
    campaign = Campaign(forks, tmp_path)
    reached = {point.rpartition(".")[0] for point in campaign.points[0]}
    assert reached >= SAVING, "these points of saving are no longer reached"
    cases = [case for case in campaign.cases(("kill",)) if case[0].endswith(".before")]
    assert len(cases) == len(reached)
    # For failures after a write: the written file must be removed again.
    refused = ("tensors.write.after", "manifest.write.after", "metrics.append.after")
    cases += [case for case in campaign.cases(("enospc",)) if case[0] in refused]
    assert len(cases) == len(reached) + len(refused)
    for case in cases:
        campaign.check(case)


def test_a_rank_killed_or_refused_while_two_save(tmp_path, forks):
    campaign = Campaign(forks, tmp_path, world=2)
    for point, rank, action in (
        ("tensors.write.before", 0, "enospc"),
        ("file.flush.before", 0, "kill"),
        ("collective.gather.before", 1, "kill"),
    ):
        campaign.check((point, rank, (campaign.points[rank][point] + 2) // 2, action))


@pytest.mark.slow
def test_a_background_save_is_killed_or_fails(tmp_path, forks):
    campaign = Campaign(forks, tmp_path, background_saving=True)
    for point, action in (
        ("tensors.write.after", "kill"),
        ("manifest.write.before", "enospc"),
        ("commit.rename.before", "kill"),
        ("retire.before", "kill"),
    ):
        campaign.check((point, 0, (campaign.points[0][point] + 2) // 2, action))
    two = Campaign(forks, tmp_path / "two", world=2, background_saving=True)
    for point, rank, action in (
        ("file.flush.before", 0, "kill"),
        ("tensors.write.before", 0, "enospc"),
        ("collective.gather.before", 1, "raise"),
        # Its peer waits for a connection inside torch, which only a deadline ends.
        ("collective.group.before", 1, "kill"),
    ):
        two.check((point, rank, (two.points[rank][point] + 2) // 2, action))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_point_before_and_after_with_every_action(tmp_path, forks):
    campaign = Campaign(forks, tmp_path)
    cases = campaign.cases()
    assert len(cases) >= 3 * 2 * len(SAVING)
    for case in cases:
        campaign.check(case)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "beside"), [(None, False), (2, False), (None, True)])
def test_every_point_on_every_rank_of_two(tmp_path, forks, stage, beside):
    if stage is not None:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra: deepspeed)")
    campaign = Campaign(forks, tmp_path, world=2, stage=stage, background_saving=beside)
    cases = campaign.cases()
    assert {rank for _, rank, _, _ in cases} == {0, 1}
    for case in cases:
        campaign.check(case)
    print(f"{len(cases)} cases under stage {stage}")
