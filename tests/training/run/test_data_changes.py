"""A run resumes with the rows that it has read; accepted appended rows join at an epoch's start."""

from __future__ import annotations

import json
import logging

import pytest

from modern_llm.config.errors import UserError
from modern_llm.data.batch.order import Order
from modern_llm.storage.atomic import verified_manifest
from modern_llm.training.run.data_changes import KEPT
from tests.helpers.steps import broken_at
from tests.helpers.text import transcripts, write_jsonl
from tests.training.checkpointing.test_resume import call, numbers, same

ROWS = 30


def until(step: int, *arguments, **changes) -> None:
    """Run the call and interrupt it in the step after `step`."""
    with broken_at(step), pytest.raises(KeyboardInterrupt):
        call(*arguments, **changes)


def rows(more: int = 0) -> list[dict]:
    return transcripts(ROWS) + transcripts(more, seed=5)


def consumed(folder) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["examples"] for line in lines]


CHANGES = {
    # change of the rows, and the first row that differs: now and before
    "edited": (lambda r: [*r[:17], {**r[17], "chosen": r[17]["chosen"] + " dog"}, *r[18:]], 18, 18),
    "inserted": (lambda r: [*r[:3], transcripts(1, seed=8)[0], *r[3:]], 4, 4),
    "deleted": (lambda r: [*r[:9], *r[10:]], 10, 10),
    "reordered": (lambda r: [*r[:20], *r[:19:-1]], 21, 21),
    "cut off": (lambda r: r[:25], None, 26),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_checkpoint):
    """A run with a checkpoint after step 4, on a file that a test may change."""
    folder = tmp_path_factory.mktemp("broken")
    data = write_jsonl(folder / "pairs.jsonl", rows())
    until(5, folder / "run", tiny_checkpoint, data)
    return folder / "run", data


@pytest.mark.parametrize("change", CHANGES)
def test_changed_rows_are_refused_with_the_first_that_differs(change, broken, tiny_checkpoint):
    folder, data = broken
    how, now, then = CHANGES[change]
    write_jsonl(data, how(rows()))
    before = numbers(folder)
    for consent in (False, True, False):  # reported again, although the tables were rebuilt
        with pytest.raises(UserError) as refusal:
            call(folder, tiny_checkpoint, data, accept_change=consent)
        text = str(refusal.value)
        assert "step-00000004" in text and "digest" in text and "forbidden" in text
        if now is None:
            assert f"row {then}, before from {data}:{then}, is missing" in text
        else:
            assert f"first differing row: {now}, {data}:{now} (before: {data}:{then})" in text
    assert numbers(folder) == before
    write_jsonl(data, rows())
    until(5, folder, tiny_checkpoint, data)  # with the original rows the run resumes
    assert not (folder / KEPT).exists()


def test_without_the_old_tables_a_change_is_still_refused(tmp_path, tiny_checkpoint):
    data = write_jsonl(tmp_path / "pairs.jsonl", rows())
    until(3, tmp_path / "run", tiny_checkpoint, data)
    (tmp_path / "run" / "data" / "train" / "ids.bin").unlink()
    write_jsonl(data, rows()[::-1])
    with pytest.raises(UserError, match="first differing row is not known"):
        call(tmp_path / "run", tiny_checkpoint, data)


def test_the_same_rows_at_another_path_are_accepted(tmp_path, tiny_checkpoint):
    data = write_jsonl(tmp_path / "pairs.jsonl", rows())
    until(3, tmp_path / "run", tiny_checkpoint, data)
    moved = data.rename(tmp_path / "moved.jsonl")
    with pytest.raises(UserError, match=r"data\.dataset_name: .* same content"):
        call(tmp_path / "run", tiny_checkpoint, moved)
    call(tmp_path / "run", tiny_checkpoint, moved, accept_change=True)
    assert len(numbers(tmp_path / "run")) == 9


@pytest.mark.slow
def test_appended_rows_join_at_the_next_epoch(tmp_path, tiny_checkpoint, caplog):
    """30 rows are 8 steps of 4; 10 more join after a stop in step 6, so in step 9."""
    data = write_jsonl(tmp_path / "pairs.jsonl", rows())
    plain, grown, twice = (tmp_path / name for name in ("plain", "grown", "twice"))
    steps = {"max_steps": 14}
    call(plain, tiny_checkpoint, data, **steps)
    for folder in (grown, twice):
        until(5, folder, tiny_checkpoint, data, **steps)
    write_jsonl(data, rows(10))
    with pytest.raises(UserError, match=rf"10 rows from {data}:31 on .*--accept-change .* step 9 "):
        call(grown, tiny_checkpoint, data, **steps)
    with caplog.at_level(logging.INFO):
        final = call(grown, tiny_checkpoint, data, **steps, accept_change=True)
    assert "they join at step 9 (epoch 2)" in caplog.text
    assert numbers(grown)[:8] == numbers(plain)[:8], "the current epoch is unchanged"
    order = Order(30, 4, 42, ((1, 40),))
    assert consumed(grown) == [order.consumed(step) for step in range(1, 15)]
    newest = sorted((grown / "checkpoints").iterdir())[-1]
    assert verified_manifest(newest)["rows"] == [[0, 30], [1, 40]]
    losses = [[loss for _, loss, *_ in numbers(folder)] for folder in (grown, plain)]
    assert all(a != b for a, b in zip(losses[0][8:], losses[1][8:], strict=True))

    # Stopped after the rows have joined, it resumes without another flag, to the same end.
    until(11, twice, tiny_checkpoint, data, **steps, accept_change=True)
    assert same(call(twice, tiny_checkpoint, data, **steps), final)
    assert numbers(twice) == numbers(grown)


def test_rows_that_would_join_after_the_end_are_a_warning(tmp_path, tiny_checkpoint, caplog):
    data = write_jsonl(tmp_path / "pairs.jsonl", rows())
    until(3, tmp_path / "run", tiny_checkpoint, data, max_steps=None, epochs=1)
    write_jsonl(data, rows(4))
    with pytest.raises(
        UserError, match=r"restore the data, or add --accept-change and raise .*9 .*8"
    ):
        call(tmp_path / "run", tiny_checkpoint, data, max_steps=None, epochs=1)
    call(tmp_path / "run", tiny_checkpoint, data, max_steps=None, epochs=1, accept_change=True)
    assert "would join at step 9, but the run ends after 8" in caplog.text
    assert len(numbers(tmp_path / "run")) == 8
