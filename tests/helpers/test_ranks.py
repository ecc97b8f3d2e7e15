"""`run_ranks`: results, errors, deaths and hangs all come back, and no process stays."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers import ranks
from tests.helpers.ranks import RankError, run_ranks

# Only the functions that need torch import it: the others then start at once.


class Refused(ValueError):
    """An exception that pickles; `Awkward` does not."""


class Awkward(Exception):
    def __init__(self, first: str, second: str):
        super().__init__(first + second)


def rank_of() -> int:
    return int(os.environ["RANK"])


def summed(values: list[float]) -> tuple[int, int, list[float]]:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mine = torch.tensor(values) * (rank_of() + 1)
    dist.all_reduce(mine)
    return dist.get_rank(), torch.get_num_threads(), mine.tolist()


def rank_one_refuses_a_barrier() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank_of() == 1:
        raise Refused("the reason")
    dist.barrier()  # rank 0 waits for a peer that is gone


def rank_two_refuses() -> None:
    if rank_of() == 2:
        raise Awkward("the ", "reason")


def rank_one_is_killed(folder: Path) -> None:
    note_pid(folder)
    if rank_of() == 1:
        while len(list(folder.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def rank_zero_hangs(folder: Path) -> None:
    note_pid(folder)
    if rank_of() == 0:
        wait_for_nothing()


def group_of_one() -> None:
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def wait_for_nothing() -> None:
    time.sleep(600)


def note_pid(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def assert_all_ended(folder: Path, count: int) -> None:
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == count
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_every_rank_returns_its_own_result_in_order():
    assert run_ranks(summed, 2, [1.0, 2.0, 4.0]) == [
        (0, 1, [3.0, 6.0, 12.0]),
        (1, 1, [3.0, 6.0, 12.0]),
    ]


def test_a_function_that_needs_no_group():
    assert run_ranks(rank_of, 3) == [0, 1, 2]


def test_the_first_exception_is_raised_with_its_type_and_traceback():
    with pytest.raises(Refused) as caught:
        run_ranks(rank_one_refuses_a_barrier, 2)
    assert str(caught.value) == "the reason"
    (note,) = caught.value.__notes__
    assert note.startswith("raised on rank 1 of 2:") and "in rank_one_refuses_a_barrier" in note


def test_an_exception_that_cannot_be_sent_is_told():
    with pytest.raises(RankError, match=r"(?s)rank 2 of 3.*Awkward: the reason"):
        run_ranks(rank_two_refuses, 3)


@pytest.mark.slow
def test_a_port_that_was_taken_meanwhile_is_replaced(monkeypatch):
    chosen = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def port() -> int:
            chosen.append(free() if chosen else taken.getsockname()[1])
            return chosen[-1]

        free = ranks._free_port
        monkeypatch.setattr(ranks, "_free_port", port)
        assert run_ranks(summed, 1, [5.0]) == [(0, 1, [5.0])]
    assert len(chosen) == 2


def test_a_killed_rank_is_named_and_the_others_end(tmp_path):
    with pytest.raises(RankError, match="rank 1 of 2 ended with status -9"):
        run_ranks(rank_one_is_killed, 2, tmp_path)
    assert_all_ended(tmp_path, 2)


@pytest.mark.slow
def test_a_hang_ends_at_the_timeout_and_says_where(tmp_path):
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\] of 2 .*in wait_for_nothing"):
        run_ranks(rank_zero_hangs, 2, tmp_path, timeout=4.0)
    assert_all_ended(tmp_path, 2)


def test_a_group_of_another_size_does_not_pass():
    with pytest.raises(AssertionError, match="torch.distributed has 1 processes instead of 2"):
        run_ranks(group_of_one, 2)


def test_a_function_that_the_other_process_cannot_find_is_refused_here():
    with pytest.raises(AssertionError, match="not at the top of a module"):
        run_ranks(lambda: None, 2)
