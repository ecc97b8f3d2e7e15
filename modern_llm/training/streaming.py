"""Training on a stream: the next window is made in a thread while the run trains on this one.

One process of each machine reads and tokenizes; the others map its tables. At most two windows
are on the disk. Windows change between two optimizer steps, on all processes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modern_llm.config import TrainingConfig
from modern_llm.config.data import StreamedDatasetConfig
from modern_llm.config.errors import ConfigError, Stopped, UserError
from modern_llm.data.batch.micro_batches import BatchSource
from modern_llm.data.batch.windowed import WindowedSource, leave_out_of_steps
from modern_llm.data.encode.pipeline import recipe_of
from modern_llm.data.table.build import Prepared, evaluation_table
from modern_llm.data.table.counts import DataReport
from modern_llm.data.table.iterate import training_sources
from modern_llm.data.table.token_table import TokenTable
from modern_llm.data.table.windows import Start, Window, WindowReader, stream_identity
from modern_llm.distributed.engine import Engine
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown.signals import stop_here
from modern_llm.models.scorer import TokenScorer
from modern_llm.setup.micro_batches import make_sources
from modern_llm.setup.tables import check_ids_fit
from modern_llm.training.context import Resume
from modern_llm.training.run.folder import RunFolder

log = logging.getLogger(__name__)

EXAMPLES = 10_000
"""Examples of a window by default."""


class _Closed(Exception):
    """The run ended while a window was made."""


def refuse_streaming(
    config: TrainingConfig, data: StreamedDatasetConfig, *, moving: bool = False
) -> None:
    """Refuse settings that need all rows before the first step.

    Args:
        moving: whether the reference follows the policy.

    Raises:
        ConfigError: `data.streaming` with one of them.
    """
    if not data.streaming:
        return
    problems = []
    if moving:
        problems.append(
            "data.streaming and dpo.reference_sync_every exclude each other: pairs would be scored "
            "for two kinds of windows; keep one"
        )
    if config.max_steps is None:
        problems.append(
            "data.streaming needs train.max_steps: how many steps an epoch has is not known before "
            "its end"
        )
    evaluated = data.eval_fraction or data.eval_split or data.eval_dataset_name
    if config.generate_every is not None and config.generate_prompts is None and not evaluated:
        problems.append(
            "train.generate_every with data.streaming needs train.generate_prompts or evaluation "
            "data: the first training examples are gone when a run is resumed"
        )
    if problems:
        raise ConfigError(problems)


def stream_of(
    ends_with: ExitStack,
    runtime: Runtime,
    run: RunFolder,
    data: StreamedDatasetConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    **lengths: Any,
) -> Stream | None:
    """Return the stream of a run, which `ends_with` closes; None without `data.streaming`."""
    if not data.streaming:
        return None
    return ends_with.enter_context(Stream(runtime, run, data, tokenizer, **lengths))


class Stream:
    """The windows of one run, as work between its steps; the tables are those of `prepare_tables`.

    A context manager, whose end removes the window made in advance.
    """

    def __init__(
        self,
        runtime: Runtime,
        run: RunFolder,
        data: StreamedDatasetConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        max_length: int,
        max_prompt_length: int | None,
    ):
        self._runtime, self._run, self._data = runtime, run, data
        self._tokenizer = tokenizer
        self._recipe = recipe_of(data, tokenizer, max_length, max_prompt_length)
        self._folder = run.data / "windows"
        self._makes = runtime.accelerator.is_local_main_process
        self._reader: WindowReader | None = None
        self._next: Future[Any] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False
        self._source: WindowedSource | None = None
        self.window: Window
        self.resume = Resume()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._remove_others(self.window.start.number)

    def open(self, checkpoint: tuple[Path, dict[str, Any]] | None) -> Prepared:
        """Make the evaluation table and the window of the next step; return them; a collective.

        Raises:
            UserError: the data is not that of the checkpoint.
            DataError: the data cannot be read.
        """
        runtime = self._runtime
        heartbeat.enter("reading the data")
        runtime.on_main(lambda: shutil.rmtree(self._folder, ignore_errors=True))
        held: DataReport | None = None
        with runtime.one_per_machine_first():
            if self._makes:
                held = self._make_evaluation()
                self._make_first(checkpoint)
        number = runtime.from_main(self.window.start.number if runtime.is_main else None)
        self.window = Window.open(self._folder / f"{number:08d}")
        heartbeat.enter("preparing the model")
        runtime.agree(self.window.table.digest, "the training data")
        self._record(self.window)
        evaluated = self._evaluated_source() is not None or self._data.eval_fraction is not None
        evaluation = None
        if evaluated:
            evaluation = TokenTable.open(self._run.data / "evaluation-set" / "evaluation")
        if runtime.is_main:
            self._log(self.window)
            if evaluation is not None:
                log.info("evaluation: %d examples", len(evaluation))
            else:
                log.info("evaluation: none, because no evaluation data is named")
        report, order = self.window.report, self._data.order
        return Prepared(self.window.table, evaluation, report, held, (report,), order=order)

    def source(
        self,
        scorer: TokenScorer,
        *vocabularies: int | None,
        examine: Callable[[Prepared], tuple[int, ...]] | None = None,
        group_by_prompt: bool = False,
    ) -> WindowedSource:
        """Return the training source.

        Args:
            vocabularies: rows of the embeddings; ids outside are refused in every window.
            examine: called on all processes with every window before its first step; returns the
                rows that its steps go without.
            group_by_prompt: see `make_sources`.
        """

        def make(window: Window) -> BatchSource:
            prepared = self._prepared(window)
            check_ids_fit(prepared, self._tokenizer, *vocabularies)
            without = examine(prepared) if examine is not None else ()
            found, _ = make_sources(
                runtime, config, prepared, scorer, group_by_prompt=group_by_prompt
            )
            if without:
                leave_out_of_steps(found, without)
            return found

        runtime, config = self._runtime, self._run.config
        self._source = WindowedSource(make, self.window)
        return self._source

    def begin(self, engine: Engine, step: int, end: int, checkpoint: Path | None) -> None:
        """Start to make the next window."""
        self._advance(end)

    def after_step(self, engine: Engine, step: int, end: int) -> None:
        """Open the next window if this one ends with `step` steps; a collective then.

        Raises:
            DataError: the rows of the next window cannot be used.
        """
        if step >= end or step < self.window.after.step:
            return
        began, runtime = time.perf_counter(), self._runtime
        failure: Exception | None = None
        with heartbeat.phase("waiting for the next window", step):
            try:
                if self._next is not None:
                    self._next.result()
            except Exception as error:
                failure = error
            runtime.raise_together(failure)
            number = self.window.start.number + 1
            self.window = Window.open(self._folder / f"{number:08d}")
            runtime.agree(self.window.table.digest, "the training data")
        assert self._source is not None
        self._record(self.window)
        if runtime.is_main:
            self._log(self.window, time.perf_counter() - began)
        # If a signal stops the reference pass, the loop saves, and the resumed run repeats it.
        with heartbeat.phase("preparing the next window", step), suppress(Stopped):
            self._source.open(self.window)
        if self._makes:
            self._remove_others(number)
        self._advance(end)

    def saved(self) -> dict[str, dict[str, Tensor]]:
        """Return nothing: a checkpoint records where its window begins."""
        return {}

    def _prepared(self, window: Window) -> Prepared:
        report = window.report
        return Prepared(window.table, None, report, parts=(report,), order=self._data.order)

    def _advance(self, end: int) -> None:
        """Start to make the next window in the thread, unless the run ends in this one."""
        if not self._makes or self.window.after.step >= end:
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "window")
        folder = self._folder / f"{self.window.start.number + 1:08d}"
        assert self._reader is not None
        self._next = self._thread.submit(self._reader.make, folder)

    def _make_evaluation(self) -> DataReport | None:
        """Write the evaluation table, all of its source or what the first window holds out."""
        folder = self._run.data / "evaluation-set"
        if self._evaluated_source() is not None:
            return evaluation_table(self._data, self._recipe, folder, self._check)
        if self._data.eval_fraction is not None:
            self._make_reader(Start()).write_held_out(folder)
        return None

    def _evaluated_source(self) -> Any:
        return self._data.eval_split or self._data.eval_dataset_name

    def _make_first(self, checkpoint: tuple[Path, dict[str, Any]] | None) -> None:
        """Write the window of the next step: of a resumed run, from where it begins in the data."""
        step, start, facts = 0, Start(), {}
        if checkpoint is not None:
            facts = checkpoint[1]
            step, start = int(facts["step"]), Start(**facts["window"])
            self._compare_source(checkpoint)
        self._reader = self._make_reader(start)
        while True:
            folder = self._folder / f"{self._reader.start.number:08d}"
            self._reader.make(folder)
            self.window = Window.open(folder)
            same = self.window.table.digest == facts.get("data")
            if checkpoint is not None and self.window.start.number == start.number and not same:
                raise UserError(
                    f"output_dir {self._run.path}: row {start.row + 1} and the rows after it, or "
                    f"the tokenizer, are not those of {checkpoint[0].name} (digest "
                    f"{str(facts.get('data'))[:12]} -> {self.window.table.digest[:12]}; "
                    "forbidden): restore them, or name another output_dir"
                )
            last = self._run.config.max_steps or 0
            if step < self.window.after.step or self.window.after.step >= last:
                return
            shutil.rmtree(folder, ignore_errors=True)

    def _compare_source(self, checkpoint: tuple[Path, dict[str, Any]]) -> None:
        """Refuse files of other names or sizes, or another commit, without `accept_change`."""
        before, now = checkpoint[1].get("stream"), self._identity()
        if before == now or self._run.config.accept_change:
            return
        raise UserError(
            f"output_dir {self._run.path}: the files of the data are not those of "
            f"{checkpoint[0].name} ({_first_difference(before, now)}): restore them, or add "
            "--accept-change if only rows after those trained on have changed"
        )

    def _identity(self) -> list[str]:
        return stream_identity(training_sources(self._data)[0])

    def _record(self, window: Window) -> None:
        """Set what checkpoints record of the data."""
        if "stream" not in self.resume.data:
            self.resume.data["stream"] = self._identity()
        self.resume.data |= {"data": window.table.digest, "window": asdict(window.start)}

    def _make_reader(self, start: Start) -> WindowReader:
        (part,) = training_sources(self._data)
        size = self._data.streaming_window or EXAMPLES
        batch = self._run.config.batch_size
        return WindowReader(self._data, self._recipe, part, size, batch, start, self._check)

    def _check(self) -> None:
        heartbeat.tick()
        if self._closed:
            raise _Closed
        self._runtime.may_write()
        if self._thread is None:  # before the loop, which has a way to stop of its own
            stop_here("while it read the data", main=self._runtime.is_main)

    def _remove_others(self, number: int) -> None:
        """Remove all windows on the disk but one."""
        for folder in self._folder.glob("*"):
            if folder.name != f"{number:08d}":
                shutil.rmtree(folder, ignore_errors=True)

    def _log(self, window: Window, waited: float | None = None) -> None:
        start, after = window.start, window.after
        wait = "" if waited is None else f" (waited {waited:.1f} s)"
        log.info(
            "data: window %d, steps %d to %d, epoch %d, from row %d on%s",
            start.number + 1, start.step + 1, after.step, start.epoch + 1, start.row + 1, wait,
        )  # fmt: skip
        for line in window.report.lines():
            log.info("data: %s", line)


def _first_difference(before: Any, now: list[str]) -> str:
    known = before if isinstance(before, list) else []
    pairs = [(old, new) for old, new in zip(known, now, strict=False) if old != new]
    old, new = pairs[0] if pairs else (f"{len(known)} files", f"{len(now)} files")
    return f"{old} -> {new}"
