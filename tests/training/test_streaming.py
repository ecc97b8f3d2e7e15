"""Streaming: windows of data give the steps of whole tables, on little disk, also when resumed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from modern_llm.cli import main
from modern_llm.config import InstructionDatasetConfig, TrainingConfig
from modern_llm.config.errors import DataError, UserError
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.read import sources as sources_module
from modern_llm.data.table.build import prepare_tables
from modern_llm.data.table.iterate import training_sources
from modern_llm.data.table.windows import Start, Window, WindowReader
from modern_llm.models.load import load_tokenizer
from modern_llm.training import streaming
from modern_llm.training.train_sft import run_sft
from tests.helpers.ranks import run_ranks
from tests.helpers.steps import broken_at
from tests.helpers.text import make_checkpoint, make_tokenizer, write_jsonl

BATCH, WINDOW, STEPS = 4, 12, 19
ROWS = 45
"""Three whole windows of three steps, and one of nine rows: the last step has one example."""


def rows(count: int = ROWS) -> list[dict[str, str]]:
    found = [
        {"prompt": f"Say {n} {'x' * (n % 7)}.", "response": f" {n * n}!"} for n in range(count)
    ]
    for at in (7, 30):  # dropped for their content
        found.insert(at, {"prompt": "Say nothing.", "response": ""})
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("stream")
    checkpoint = make_checkpoint(folder / "model", make_tokenizer(folder / "tokenizer"))
    return SimpleNamespace(model=checkpoint, data=write_jsonl(folder / "rows.jsonl", rows()))


def run(files, folder: Path, *, streaming: bool = True, data: dict | None = None, **train: Any):
    fields = {
        "run_name": "x", "output_dir": folder, "batch_size": BATCH, "max_steps": STEPS,
        "learning_rate": 1e-3, "log_every": 1, "tokens_per_micro_batch": 120, "save_every": 2,
    }  # fmt: skip
    options = {"streaming": True, "streaming_window": WINDOW} if streaming else {}
    options |= {"dataset_name": str(files.data), "max_length": 48, "max_dropped": 0.2}
    run_sft(
        files.model,
        TrainingConfig(**(fields | train)),
        InstructionDatasetConfig(**(options | (data or {}))),
    )
    return losses(folder)


def losses(folder: Path, name: str = "loss") -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record[name] for record in lines if name in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "x_final" / "model.safetensors")


def reader(files, start: Start | None = None, size: int = WINDOW, **options: Any) -> WindowReader:
    options = {"dataset_name": str(files.data), "max_dropped": 0.2, "max_length": 48} | options
    config = InstructionDatasetConfig(**options)
    recipe = recipe_of(config, load_tokenizer(str(files.model)), 48, None)
    (part,) = training_sources(config)
    return WindowReader(config, recipe, part, size, BATCH, start or Start(), lambda: None)


def contents(window: Window) -> list[tuple[str, list[int]]]:
    table = window.table
    return [(table.origin(i), table.ids(i, "response").tolist()) for i in range(len(table))]


def test_windows_hold_the_rows_of_a_whole_table_in_order(files, tmp_path):
    config = InstructionDatasetConfig(dataset_name=str(files.data), max_dropped=0.2, max_length=48)
    whole = prepare_tables(config, load_tokenizer(str(files.model)), tmp_path / "whole").train
    expected = [(whole.origin(i), whole.ids(i, "response").tolist()) for i in range(len(whole))]
    windows, source = [], reader(files)
    for number in range(8):
        source.make(tmp_path / str(number))
        windows.append(Window.open(tmp_path / str(number)))
    assert [len(w.table) for w in windows] == [12, 12, 12, 9] * 2
    assert [w.start.step for w in windows] == [0, 3, 6, 9, 12, 15, 18, 21]
    assert [w.start.epoch for w in windows] == [0] * 4 + [1] * 4
    assert [w.start.examples for w in windows][:5] == [0, 12, 24, 36, 45]
    assert [w.start.epoch_steps for w in windows] == [0] * 4 + [12] * 4
    assert sum(map(contents, windows[:4]), []) == expected == sum(map(contents, windows[4:]), [])
    assert sum(w.report.dropped for w in windows) == 4


@pytest.mark.parametrize("number", range(6))
def test_a_window_is_the_same_from_where_it_begins(number, files, tmp_path):
    source = reader(files)
    for at in range(number):
        source.make(tmp_path / str(at))
    start = source.start
    source.make(tmp_path / "one")
    reader(files, start).make(tmp_path / "other")
    one, other = Window.open(tmp_path / "one"), Window.open(tmp_path / "other")
    assert (one.start, one.after) == (other.start, other.after)
    assert one.table.digest == other.table.digest
    assert one.report.as_dict() == other.report.as_dict()


def test_the_rows_before_a_window_are_not_tokenized_again(files, tmp_path):
    source = reader(files, Start(number=2, step=6, examples=24, row=25))
    seen: list[str] = []
    encode = source._recipe.encoder
    source._recipe.encoder = lambda texts: seen.extend(texts) or encode(texts)
    source.make(tmp_path / "w")
    assert seen and not any("Say 3 " in text for text in seen)


def test_a_window_ends_on_a_whole_step(files, tmp_path):
    source = reader(files, size=9)
    source.make(tmp_path / "w")
    assert len(Window.open(tmp_path / "w").table) == 12


def test_a_source_that_ends_with_a_window_begins_again(files, tmp_path):
    data = SimpleNamespace(model=files.model, data=write_jsonl(tmp_path / "r.jsonl", rows()[8:20]))
    source = reader(data)
    for number in range(3):
        source.make(tmp_path / str(number))
    windows = [Window.open(tmp_path / str(number)) for number in range(3)]
    assert [w.start.epoch for w in windows] == [0, 1, 2]
    assert len({w.table.digest for w in windows}) == 1


def test_held_out_rows_are_in_no_window(files, tmp_path):
    source = reader(files, eval_fraction=0.3)
    seen: list[str] = []
    for number in range(4):
        source.make(tmp_path / str(number))
        seen += [origin for origin, _ in contents(Window.open(tmp_path / str(number)))]
    config = InstructionDatasetConfig(
        dataset_name=str(files.data), max_dropped=0.2, max_length=48, eval_fraction=0.3
    )
    whole = prepare_tables(config, load_tokenizer(str(files.model)), tmp_path / "whole")
    assert set(seen) == {whole.train.origin(i) for i in range(len(whole.train))}


@pytest.mark.parametrize("text", ["", '{"prompt": "x", "response": ""}\n' * 3])
def test_a_source_without_a_good_row_is_refused(text, files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(text, encoding="utf-8")
    bad = SimpleNamespace(model=files.model, data=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="holds no rows|rows are bad"):
        reader(bad).make(tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_a_broken_row_names_its_line(files, tmp_path):
    lines = [json.dumps(row) for row in rows(20)]
    lines[16] = '{"prompt": '
    (tmp_path / "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    bad = SimpleNamespace(model=files.model, data=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl:17.*on_bad_row: skip"):
        reader(bad).make(tmp_path / "w")
    reader(bad, on_bad_row="skip").make(tmp_path / "w")


def test_a_window_above_the_data_trains_as_whole_tables_do(files, tmp_path):
    """Two epochs: a window is then an epoch, and its order that of the epoch."""
    whole = run(files, tmp_path / "whole", streaming=False)
    streamed = run(files, tmp_path / "stream", data={"streaming_window": 1000})
    assert streamed == whole and len(whole) == STEPS
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stream")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "stream", "examples") == losses(tmp_path / "whole", "examples")


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; one that moves to its final name meanwhile counts once."""
    found: dict[int, int] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(root, name))
                found[status.st_ino] = status.st_size
    return sum(found.values())


def test_the_disk_holds_two_windows_at_most(files, tmp_path, monkeypatch):
    sizes: list[int] = []
    real = streaming.Stream.after_step

    def measured(self, *args):
        real(self, *args)
        sizes.append(size_of(tmp_path / "run" / "data"))

    monkeypatch.setattr(streaming.Stream, "after_step", measured)
    run(files, tmp_path / "run")
    monkeypatch.undo()
    reader(files).make(tmp_path / "one")
    one = size_of(tmp_path / "one")
    assert len(sizes) == STEPS and max(sizes) < 2.2 * one
    assert len(list((tmp_path / "run" / "data" / "windows").iterdir())) == 1


def test_steps_take_the_windows_in_order_and_shuffle_each(files, tmp_path):
    source, taken = reader(files), []
    for number in range(3):
        source.make(tmp_path / str(number))
        key = np.array([42, number], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(12)
        origins = [origin for origin, _ in contents(Window.open(tmp_path / str(number)))]
        taken += [origins[i] for i in order]
    found: list[list[str]] = []

    class Seen:
        def on_step_end(self, state, control):
            found.append(sum(task.origins(state.step - 1), []))

    task: Any = None
    real = streaming.Stream.source

    def source_of(self, *args):
        nonlocal task
        task = real(self, *args)
        return task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming.Stream, "source", source_of)
        fields = TrainingConfig(
            run_name="x", output_dir=tmp_path / "run", batch_size=BATCH, max_steps=9, seed=42
        )
        data = InstructionDatasetConfig(
            dataset_name=str(files.data), streaming=True, streaming_window=WINDOW,
            max_length=48, max_dropped=0.2,
        )  # fmt: skip
        run_sft(files.model, fields, data, callbacks=[Seen()])
    steps = [sorted(taken[at : at + BATCH]) for at in range(0, 36, BATCH)]
    assert [sorted(step) for step in found] == steps


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bitwise_the_run_without_a_break(background, files, tmp_path):
    settings = {"background_saving": background}
    whole = run(files, tmp_path / "whole", **settings)
    for step in (3, 8, 14):  # in the first window, in a later one, in the second epoch
        with broken_at(step), pytest.raises(KeyboardInterrupt):
            run(files, tmp_path / "broken", **settings)
    assert run(files, tmp_path / "broken", **settings) == whole
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_continues_with_more_steps(files, tmp_path):
    whole = run(files, tmp_path / "whole", schedule="constant", warmup_steps=0)
    settings = {"schedule": "constant", "warmup_steps": 0, "save_every": 3}
    run(files, tmp_path / "short", max_steps=7, **settings)
    more = run(files, tmp_path / "short", accept_change=True, **settings)
    assert more == whole


def in_processes(files, folder, breaks: int | None, data: dict) -> list[float]:
    from modern_llm.config.errors import PeerError

    with broken_at(breaks):
        try:
            return run(files, folder, data=data)
        except (KeyboardInterrupt, PeerError):
            return []


@pytest.mark.slow
def test_processes_share_windows_and_a_resume_may_have_another_number(files, tmp_path):
    whole = run(files, tmp_path / "one", data={"eval_fraction": 0.1}, eval_every=5)
    assert losses(tmp_path / "one", "eval/loss")
    whole = run(files, tmp_path / "alone")
    found = run_ranks(in_processes, 2, files, tmp_path / "two", None, {})
    assert found[0] == pytest.approx(whole, abs=1e-5) and len(whole) == STEPS
    with broken_at(8), pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "changed")
    again = run_ranks(in_processes, 2, files, tmp_path / "changed", None, {})
    assert again[0] == pytest.approx(whole, abs=1e-5)


def test_evaluation_data_is_read_whole(files, tmp_path):
    other = write_jsonl(tmp_path / "eval.jsonl", rows(20)[:6])
    run(files, tmp_path / "run", data={"eval_dataset_name": str(other)}, max_steps=5, eval_every=2)
    held = run(files, tmp_path / "held", data={"eval_fraction": 0.2}, max_steps=5, eval_every=2)
    for name in ("run", "held"):
        assert len(losses(tmp_path / name, "eval/loss")) == 3
    assert len(held) == 5


def test_other_data_on_resume_is_refused(files, tmp_path):
    data = SimpleNamespace(model=files.model, data=tmp_path / "rows.jsonl")
    write_jsonl(data.data, rows())
    with broken_at(8), pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run")
    changed = rows()
    changed[-1]["response"] += " More."
    write_jsonl(data.data, changed)
    with pytest.raises(UserError, match="rows.jsonl .* -> .*--accept-change"):
        run(data, tmp_path / "run")
    changed[32]["prompt"] += "?"  # in the window of the checkpoint
    write_jsonl(data.data, changed)
    with pytest.raises(UserError, match="row 25 and the rows after it.*forbidden"):
        run(data, tmp_path / "run", accept_change=True)
    changed[32] = rows()[32]
    write_jsonl(data.data, changed)
    assert len(run(data, tmp_path / "run", accept_change=True)) == STEPS


def test_a_row_that_breaks_a_later_window_ends_the_run_and_can_be_skipped(files, tmp_path):
    lines = [json.dumps(row) for row in rows()]
    lines[20] = '{"prompt": '
    bad = SimpleNamespace(model=files.model, data=tmp_path / "bad.jsonl")
    bad.data.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"bad\.jsonl:21"):
        run(bad, tmp_path / "run", data={"streaming_window": 4})


def test_a_stream_of_the_hub_is_read_row_by_row(files, tmp_path, monkeypatch):
    class Info:
        sha = "abc"

    class Api:
        def dataset_info(self, name):
            return Info()

    read: list[int] = []

    def endless():
        for number in range(10**9):
            read.append(number)
            yield {"prompt": f"Say {number}.", "response": f" {number}!"}

    import datasets
    import huggingface_hub

    stream = datasets.IterableDataset.from_generator(endless)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, streaming, **k: stream)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert sources_module.open_source("owner/endless", streaming=True).identity
    hub = SimpleNamespace(model=files.model, data="owner/endless")
    assert len(run(hub, tmp_path / "run", max_steps=7)) == 7
    assert len(read) < 10_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--data.streaming", "--train.epochs", "1"],
            "data.streaming needs train.max_steps",
        ),
        (["--data.streaming_window", "5", "--train.max_steps", "3"], "no effect without streaming"),
        (
            ["--data.streaming", "--train.max_steps", "3", "--data.order", "level"],
            "streaming knows no order of all rows, as order 'level' is",
        ),
        (
            ["--data.streaming", "--train.max_steps", "3", "--data.streaming_window", "0"],
            "streaming_window",
        ),
        (
            ["--data.streaming", "--train.max_steps", "3", "--train.generate_every", "1"],
            "needs train.generate_prompts or evaluation data",
        ),
    ],
)
def test_what_needs_all_rows_is_refused_in_one_line(options, sentence, files, tmp_path, capsys):
    command = ["sft", "--pretrain_checkpoint", str(files.model), "--train.run_name", "x"]
    command += ["--data.dataset_name", str(files.data), "--train.output_dir", str(tmp_path / "r")]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and len(error.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_dry_run_reads_one_window(files, tmp_path, capsys):
    command = ["sft", "--pretrain_checkpoint", str(files.model), "--train.run_name", "x"]
    command += ["--data.dataset_name", str(files.data), "--train.output_dir", str(tmp_path / "r")]
    command += ["--train.batch_size", "4", "--train.max_steps", "9", "--data.max_dropped", "0.2"]
    command += ["--data.streaming", "--data.streaming_window", "12"]
    assert main([*command, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == 9 and result["data"]["examples"] == 12
