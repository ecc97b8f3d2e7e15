"""Saves, kills, a full disk, damage, retention and a second writer in any order: from the first
save on, one checkpoint always verifies."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from modern_llm.config.errors import StorageError, UserError
from modern_llm.storage import atomic, fault_points
from modern_llm.storage.atomic import TEMPORARY, committed_folder, verified_manifest
from modern_llm.training.checkpointing import format
from modern_llm.training.run.lock import NAME, RunLock

POINTS = (
    "folder.make", "state.write", "tensors.write", "file.flush", "manifest.write", "folder.flush",
    "commit.rename",
)  # fmt: skip
SHORT, LONG = 500, 10_000
STEPS_EACH = 25


class Killed(BaseException):
    """Ends a save as SIGKILL would: no later code runs, clean-up included."""


class Checkpoints(RuleBasedStateMachine):
    """A run folder with its lock, and a model of what it must contain."""

    actions = 0

    @initialize(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="machine-", dir=_memory()))
        self.folder, self.keep = self.root / "checkpoints", keep
        self.step, self.good, self.intact = 0, set(), {}
        self.lock = RunLock(self.root, patience=1e6)
        self.lock.take()

    def teardown(self) -> None:
        os.environ.pop(fault_points.VARIABLE, None)
        if hasattr(self, "root"):
            self.lock.release()
            shutil.rmtree(self.root, ignore_errors=True)

    @rule()
    def save(self) -> None:
        """A successful save, followed by retention."""
        self._write()
        self._committed()
        self._retire()

    @rule(point=st.sampled_from(POINTS), nth=st.integers(1, 3), after=st.booleans())
    def disk_refuses(self, point: str, nth: int, after: bool) -> None:
        """No space at some point: the temporary folder is removed, everything else is kept."""
        if self._hit(point, nth, after, OSError(28, "No space left on device")):
            assert not list(self.folder.glob(f"{TEMPORARY}*"))

    @rule(point=st.sampled_from(POINTS), nth=st.integers(1, 3), after=st.booleans())
    def killed(self, point: str, nth: int, after: bool) -> None:
        """SIGKILL at some point; the lock dies with its owner, and another process resumes."""
        if self._hit(point, nth, after, Killed()):
            self._start_over()

    @rule()
    def killed_between_commit_and_retention(self) -> None:
        self._write()
        self._committed()
        self._start_over()

    @rule()
    def killed_while_retiring(self) -> None:
        """A half-removed folder is damaged, and older than the newest."""
        self._write()
        self._committed()
        old = sorted(self.intact)[: -self.keep]
        if old:
            (self._place(old[0]) / atomic.MANIFEST).unlink()
            self.intact.pop(old[0])
        self._start_over()

    @precondition(lambda self: len(self.intact) > 1)
    @rule(data=st.data())
    def damage(self, data) -> None:
        """A flipped byte in any checkpoint, if another intact one is left."""
        step = data.draw(st.sampled_from(sorted(self.intact)))
        path = data.draw(st.sampled_from(sorted(self._place(step).rglob("*"))))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 255
        path.write_bytes(content)
        self.intact.pop(step)
        self.good.discard(self._place(step).name)

    @rule()
    def retire_again(self) -> None:
        self._retire()

    @rule(keep=st.integers(1, 3))
    def start_again_with_another_retention(self, keep: int) -> None:
        self.keep = keep
        self._start_over()
        self._retire()

    @rule()
    def second_writer(self) -> None:
        """It is refused while the first is alive, and changes nothing."""
        before = sorted(self.root.rglob("*"))
        other = RunLock(self.root, patience=1e6)
        with pytest.raises(UserError, match="in use by another trainer"):
            other.refuse_if_held()
            other.take()
        assert [p for p in sorted(self.root.rglob("*")) if p.name[:5] != ".new-"] == before
        other.release()
        self.lock.check()

    @invariant()
    def one_verifies_and_the_newest_is_found(self) -> None:
        type(self).actions += 1
        if not hasattr(self, "root"):
            return
        for step, digest in self.intact.items():
            assert verified_manifest(self._place(step)) == {"step": step, "digest": digest}
        if self.step_committed():
            place, facts = format.newest(self.folder)
            assert self.intact, "no checkpoint is left"
            assert facts["step"] == max(self.intact) and place == self._place(facts["step"])

    def step_committed(self) -> bool:
        return bool(self.intact) or any(self.folder.glob("step-*"))

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _write(self, faulty=None) -> None:
        """Write the next step's checkpoint with the calls of a save."""
        self.step += 1
        step, facts = self.step, {"step": self.step, "digest": f"{self.step:x}"}
        with committed_folder(self._place(step), facts) as place:
            with fault_points.around("state.write"):
                (place / format.STATE).write_text(json.dumps({"step": step}))
            tensors = {"weight": torch.full((5,), float(step))}
            format.write_tensors(place / "model.safetensors", tensors, {})

    def _committed(self) -> None:
        self.intact[self.step] = f"{self.step:x}"
        self.good.add(self._place(self.step).name)

    def _retire(self) -> None:
        before = set(self.intact)
        format.retire(self.folder, self.keep, self.good)
        kept = set(sorted(before, reverse=True)[: self.keep])
        assert {step for step in before if self._place(step).is_dir()} == kept
        self.intact = {step: self.intact[step] for step in kept}

    def _hit(self, point: str, nth: int, after: bool, error: BaseException) -> bool:
        """Save while `error` is raised at the point; return whether the point was reached."""
        reached, count = fault_points.reach, [0]

        def reach(name: str) -> None:
            if name == f"{point}.{'after' if after else 'before'}":
                count[0] += 1
                if count[0] == nth:
                    raise error

        os.environ[fault_points.VARIABLE] = "nowhere.before:0:1:kill"
        fault_points.reach, real = reach, shutil.rmtree
        if isinstance(error, Killed):  # a killed process removes nothing
            shutil.rmtree = lambda *args, **options: None
        try:
            self._write()
        except (Killed, StorageError):
            pass
        finally:
            fault_points.reach, shutil.rmtree = reached, real
            del os.environ[fault_points.VARIABLE]
        # If it was committed before the error, it exists and is intact.
        if self._place(self.step).is_dir():
            self._committed()
        return count[0] >= nth

    def _start_over(self) -> None:
        """First actions of a new process: lock of the dead one, leftovers, checkpoints."""
        head = (self.root / NAME).read_bytes()
        self.lock.release()
        (self.root / NAME).write_bytes(head)  # as a killed owner leaves it: nobody holds it
        self.lock, self.good = RunLock(self.root, patience=1e6), set()
        self.lock.take()
        format.remove_leftovers(self.folder)
        assert not list(self.folder.glob(f"{TEMPORARY}*"))


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def explore(actions: int) -> None:
    """Run the machine for `actions` actions."""
    Checkpoints.actions = 0
    examples = -(-actions * 8 // (5 * STEPS_EACH))  # some examples end early
    options = settings(
        max_examples=examples, stateful_step_count=STEPS_EACH, deadline=None,
        derandomize=True, database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(Checkpoints, settings=options)
    print(f"{Checkpoints.actions} actions")
    assert Checkpoints.actions >= actions


@pytest.mark.slow
def test_one_checkpoint_verifies_at_all_times():
    explore(SHORT)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_one_checkpoint_verifies_at_all_times_for_long():
    explore(LONG)
