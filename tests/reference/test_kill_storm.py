"""Fills that are killed at random moments end with the store of a fill that nobody disturbed."""

from __future__ import annotations

import platform
import random
import time
from pathlib import Path

import numpy as np
import pytest

from modern_llm.data.batch.order import Sharing
from modern_llm.data.preference_datasets import PreferenceDatasetConfig
from modern_llm.data.table.build import prepare_tables
from modern_llm.data.table.token_table import TokenTable
from modern_llm.reference.answers import AnswerBatches, Answers
from modern_llm.reference.store.entries import Entries
from modern_llm.reference.store.store import ReferenceStore
from tests.helpers.fills import (
    IDENTITY,
    Numbered,
    check_shards,
    expect_equal,
    fill_numbered,
    fill_pairs,
    read_log,
    scripted,
)
from tests.helpers.forks import PEER_S, Forks, Job, fork_server
from tests.helpers.text import make_checkpoint, make_tokenizer, transcripts, write_jsonl

FLUSH = 4
"""Pairs of a piece; 8 answers."""
STALL_S = 60.0


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with fork_server(tmp_path_factory.mktemp("forks"), "tests.helpers.fills") as server:
        yield server


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny checkpoint, and pairs of very unequal lengths, tokenised."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(folder / "tokenizer")
    pairs = write_jsonl(folder / "pairs.jsonl", transcripts(240, seed=5))
    prepared = prepare_tables(
        PreferenceDatasetConfig(dataset_name=str(pairs)),
        AutoTokenizer.from_pretrained(tokenizer),
        folder / "tokens",
        max_length=96,
    )
    return make_checkpoint(folder / "model", tokenizer), prepared.train.folder


class PairFill:
    """A fill of the pairs on two processes into a store of its own, started as often as needed."""

    def __init__(self, forks: Forks, folder: Path, inputs: tuple[Path, Path]):
        self._forks, self._inputs = forks, inputs
        self.cache, self.log = folder / "cache", folder / "log"
        self.answers = Answers(TokenTable.open(inputs[1]))

    def start(self) -> list[Job]:
        """Start both ranks; return when they are a group."""
        for _ in range(3):
            signs = [self.log.with_name(f"log.{rank}") for rank in range(2)]
            for sign in signs:
                sign.unlink(missing_ok=True)
            self.log.parent.mkdir(exist_ok=True)
            jobs = self._forks.start_ranks(
                fill_pairs, 2, *self._inputs, self.cache, self.log, FLUSH
            )
            until(lambda: all(sign.exists() for sign in signs) or ended(jobs), "form a group")  # noqa: B023
            if all(sign.exists() for sign in signs):
                return jobs
            for job in jobs:
                job.kill()
            assert "address already in use" in (jobs[0].text + jobs[1].text).lower(), jobs[0].text
        raise AssertionError("no free port in three attempts")

    @property
    def folder(self) -> Path:
        (folder,) = (self.cache / "references").iterdir()
        return folder

    def store(self) -> ReferenceStore:
        return ReferenceStore.open(self.folder)

    def entries(self) -> Entries:
        return self.store().find(self.answers.keys, tokens=True)

    def most_in_a_piece(self) -> int:
        everything = np.arange(len(self.answers))
        trees = AnswerBatches(self.answers, everything, shared=Sharing.ROWS, budget=200)
        return 2 * FLUSH - 1 + max(len(trees.entries(group)) for group in trees.groups())


def ended(jobs: list[Job]) -> bool:
    return any(job.status is not None for job in jobs)


def until(condition, what: str) -> None:
    deadline = time.monotonic() + STALL_S
    while not condition():
        assert time.monotonic() < deadline, f"did not {what} in {STALL_S} s"
        time.sleep(0.002)


def undisturbed(fill: PairFill) -> Entries:
    jobs = fill.start()
    assert all(job.wait(STALL_S) for job in jobs)
    assert [job.status for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    log = read_log(fill.log)
    assert len(log) == len(np.unique(log)) == len(fill.answers)
    return fill.entries()


def disturb(fill: PairFill, rng: random.Random) -> bool:
    """Start a fill, kill one rank at some moment; return False if it had ended by itself."""
    before = len(read_log(fill.log))
    jobs = fill.start()
    if rng.random() < 0.2:  # while it starts: weights, first look at the store, first claims
        time.sleep(rng.uniform(0, 0.5))
    else:  # while it scores, writes, joins
        goal = before + rng.randrange(30)
        until(lambda: len(read_log(fill.log)) > goal or ended(jobs), "score")
        time.sleep(rng.uniform(0, 0.02))
    victim = rng.randrange(2)
    killed = jobs[victim].kill()
    assert jobs[1 - victim].wait(PEER_S), "the peer of a killed process hangs"
    if not killed:
        assert [job.status for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
        return False
    stores = list(fill.cache.glob("references/*"))
    if not stores:
        assert len(read_log(fill.log)) == 0
        return True
    # Nothing that has its name is torn, and what was scored and is not there is one piece at most.
    identity = None if not list(stores[0].glob("shard-*")) else fill.store().identity
    if identity is not None:
        check_shards(stores[0], identity)
    scored = np.unique(read_log(fill.log)[before:])
    kept = fill.entries().keys if identity is not None else scored[:0]
    lost = np.setdiff1d(scored, kept)
    assert len(lost) <= fill.most_in_a_piece(), f"{len(lost)} answers lost by one kill"
    return True


def storm(forks: Forks, folder: Path, inputs: tuple[Path, Path], kills: int) -> None:
    rng = random.Random(20)
    calm = PairFill(forks, folder / "calm", inputs)
    expected = undisturbed(calm)
    done = rounds = 0
    while done < kills:
        fill = PairFill(forks, folder / f"storm{rounds}", inputs)
        rounds, here = rounds + 1, 0
        while done + here < kills and disturb(fill, rng):
            here += 1
        done += here
        jobs = fill.start()
        assert all(job.wait(STALL_S) for job in jobs)
        assert [job.status for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
        expect_equal(fill.entries(), expected)
        assert fill.store().identity == calm.store().identity
        log = read_log(fill.log)
        twice = len(log) - len(np.unique(log))
        assert twice <= here * fill.most_in_a_piece()
        expect_swept(fill.store())
    print(f"{done} kills in {rounds} fills")


def expect_swept(store: ReferenceStore) -> None:
    """Every shard is whole, and what the killed have left goes with one call."""
    intact, problems = store.verify()
    assert intact >= 1 and not problems
    store.clean()
    assert not list(store.claims.folder.iterdir())
    assert not list(store.folder.glob(f".tmp-{platform.node()}-*"))


@pytest.mark.slow
def test_thirty_kills_of_a_fill_on_two_processes(forks, tmp_path, inputs):
    storm(forks, tmp_path, inputs, 30)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills_of_a_fill_on_two_processes(forks, tmp_path, inputs):
    storm(forks, tmp_path, inputs, 200)


JOBS = 8
COUNT, PIECE = 1600, 8


def expect_filled(folder: Path) -> None:
    keys = Numbered(COUNT).keys
    store = ReferenceStore(folder, IDENTITY)
    expect_equal(store.find(keys, tokens=True), scripted(keys, tokens=True))
    check_shards(folder, IDENTITY)
    expect_swept(store)


def eight(forks: Forks, folder: Path, most: int, rng: random.Random) -> tuple[int, int]:
    """Let eight jobs fill one store while up to `most` of them are killed and started again.

    Returns:
        Number of kills, and of answers that were scored more than once.
    """
    folder.mkdir()
    log, kills = folder / "log", 0
    arguments = (folder / "store", log, COUNT, PIECE, 0.008)
    jobs = [forks.start(fill_numbered, *arguments) for _ in range(JOBS)]
    while kills < most:
        goal = len(read_log(log)) + rng.randrange(40)
        until(lambda: len(read_log(log)) > goal or ended(jobs), "score")  # noqa: B023
        time.sleep(rng.uniform(0, 0.01))
        victim = rng.randrange(JOBS)
        if ended(jobs) or not jobs[victim].kill():
            break
        kills += 1
        check_shards(folder / "store", IDENTITY)
        jobs[victim] = forks.start(fill_numbered, *arguments)
    for job in jobs:
        assert job.wait(STALL_S), "a job hangs"
        assert job.status == 0, job.text
    scored = read_log(log)
    expect_filled(folder / "store")
    return kills, len(scored) - len(np.unique(scored))


def storm_of_eight(forks: Forks, folder: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    done = rounds = 0
    while done < kills:
        here, twice = eight(forks, folder / str(rounds), kills - done, rng)
        # One piece for each kill, and seldom another: two may take over one claim, and both do it.
        assert twice <= 2 * here * PIECE
        done, rounds = done + here, rounds + 1
    print(f"{done} kills in {rounds} fills by eight jobs")


def test_eight_jobs_share_the_work_of_one_store(forks, tmp_path):
    assert eight(forks, tmp_path / "store", 0, random.Random(0)) == (0, 0)


@pytest.mark.slow
def test_eight_jobs_that_are_killed_and_started_again(forks, tmp_path):
    alone = forks.start(fill_numbered, tmp_path / "calm", tmp_path / "calm-log", COUNT, PIECE, 0)
    assert alone.wait(STALL_S) and alone.status == 0, alone.text
    expect_filled(tmp_path / "calm")
    storm_of_eight(forks, tmp_path, 30, seed=21)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_eight_jobs_that_are_killed_two_hundred_times(forks, tmp_path):
    storm_of_eight(forks, tmp_path, 200, seed=22)
