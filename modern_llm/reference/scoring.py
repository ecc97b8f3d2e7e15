"""Forward-only scoring of answers: each distinct (prompt, response) once, prompts shared.

`Answers` is what a table of pairs needs scored; `Trees` lays some of these out for a model;
`Scoring` runs the model on them. Called by the reference pass and by `score`.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError
from modern_llm.data.batch.collate import MicroBatch, collate
from modern_llm.data.batch.order import Budget, Sharing, place
from modern_llm.data.batch.prefix_tree import Sequence as Laid
from modern_llm.data.batch.prefix_tree import lay_out
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.health import heartbeat
from modern_llm.distributed.runtime import Runtime
from modern_llm.distributed.shutdown import consensus
from modern_llm.reference.cpu_parallel import in_order, lanes
from modern_llm.reference.keys import KEY_BYTES, entry_keys
from modern_llm.reference.store.entries import Entries, concatenate

log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
# Tokens of one forward where the user says nothing. No activations are kept for a backward, so on a
# GPU it may hold more than training does; on a CPU what stays in the caches is fastest (seen on two
# cores: 800 tokens 34 pairs/s, 2,048 tokens 26, 6,000 tokens 27).
FORWARD_TOKENS = {"cpu": 768, "cuda": 32_768}
BRANCHES = 8
"""Most answers of one prompt in one tree."""


class Answers:
    """The distinct answers in a table of pairs.

    Attributes:
        keys: (E,) S16 names, each once, sorted.
        of_pairs: (P, 2) index into `keys` of every pair's chosen and rejected answer.
        targets: (E,) numbers of target tokens.
    """

    def __init__(self, table: TokenTable):
        self.table = table
        names: list[bytes] = []
        prompts: list[bytes] = []
        nothing = np.zeros(0, np.int32)
        for row in range(len(table)):
            answers = [table.ids(row, side) for side in SIDES]
            *keys, prompt = entry_keys(table.ids(row, "prompt"), *answers, nothing)
            names += keys
            prompts.append(prompt)
        every = np.frombuffer(b"".join(names), f"S{KEY_BYTES}")
        self.keys, self._first, inverse = np.unique(every, return_index=True, return_inverse=True)
        self.of_pairs = inverse.reshape(-1, 2)
        self._prompts = np.frombuffer(b"".join(prompts), f"S{KEY_BYTES}")[self._first // 2]
        columns = [table.columns.index(name) for name in ("prompt", *SIDES)]
        lengths = np.asarray(table.lengths)[:, columns][self._first // 2]
        self.prompt_lengths = lengths[:, 0]
        self.lengths = np.where(self._first % 2, lengths[:, 2], lengths[:, 1])
        # Without a prompt the first token of an answer has nothing before it.
        self.targets = self.lengths - (self.prompt_lengths == 0)

    def __len__(self) -> int:
        return len(self.keys)

    def origin(self, entry: int) -> str:
        """Return file and line of the first pair that has this answer."""
        return self.table.origin(int(self._first[entry]) // 2)

    def earliest(self, entries: NDArray[np.int64]) -> int:
        """Return the one of some answers that comes first in the data."""
        return int(entries[self._first[entries].argmin()])

    def prompt(self, entry: int) -> NDArray[np.int32]:
        """Return the ids of an answer's prompt."""
        return self.table.ids(int(self._first[entry]) // 2, "prompt")

    def response(self, entry: int) -> NDArray[np.int32]:
        """Return the ids of an answer."""
        row, side = divmod(int(self._first[entry]), 2)
        return self.table.ids(row, SIDES[side])

    def by_prompt(self, entries: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return `entries` (n,) so that answers of one prompt stand side by side.

        Among them in the order of the data, chosen before rejected, as training lays out a pair: in
        16 bits another order of keys in attention moves the sum of an answer by tenths of a nat.
        """
        return entries[np.lexsort((self._first[entries], self._prompts[entries]))]

    def same_prompt(self, one: int, other: int) -> bool:
        """Whether two answers have the same prompt."""
        return bool(self._prompts[one] == self._prompts[other])


class Trees:
    """Some answers laid out for one model: trees of one prompt with up to `BRANCHES` answers.

    Args:
        entries: (n,) indices into `answers`.
        trees: what rows may hold; answers share the computation of their prompt where several.
        budget: tokens of one forward, padding included.
        alone: whether each answer has a forward of its own.
    """

    slots = BRANCHES

    def __init__(
        self,
        answers: Answers,
        entries: NDArray[np.int64],
        *,
        trees: Sharing | bool,
        budget: int,
        alone: bool = False,
    ):
        self.answers, self.budget, self._trees, self._alone = answers, budget, trees, alone
        self._items: list[list[int]] = []
        before, size = -1, 0
        for entry in answers.by_prompt(entries).tolist():
            length = int(answers.lengths[entry])
            item = self._items[-1] if self._items else []
            fits = not alone and len(item) < BRANCHES and (len(item) < 2 or size + length <= budget)
            if before >= 0 and fits and answers.same_prompt(before, entry):
                item.append(entry)
                size += length
            else:
                self._items.append([entry])
                size = int(answers.prompt_lengths[entry]) + length
            before = entry

    def entries(self, group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the answers of some trees, in the order in which they are scored."""
        return np.array([e for item in group.tolist() for e in self._items[item]], np.int64)

    def groups(
        self, items: NDArray[np.int64] | None = None, budget: int | None = None
    ) -> list[NDArray[np.int64]]:
        """Return the trees (or some of them) in groups that fit the budget, longest first.

        A function of the answers and the budget alone: the number of processes changes no group,
        so it changes no number either.
        """
        chosen = np.arange(len(self._items)) if items is None else items
        if self._alone:
            return [chosen[at : at + 1] for at in range(len(chosen))]
        limit = Budget(tokens=budget or self.budget)
        (groups,) = place(chosen, self.sizes, world=1, budget=limit, shared=self._trees)
        return [group for group in groups if len(group)]

    def sequences(self, item: int) -> list[Laid]:
        """Return the sequences of one tree, for `collate`."""
        entries = self._items[item]
        prompt = self.answers.prompt(entries[0])
        responses = [self.answers.response(entry) for entry in entries]
        if self._trees:
            return [lay_out(prompt, responses, range(len(entries)))]
        return [lay_out(prompt, [response], [slot]) for slot, response in enumerate(responses)]

    def branches(self, item: int) -> int:
        """Return the number of answers of one tree."""
        return len(self._items[item])

    def sizes(self, item: int) -> tuple[int, ...]:
        """Return the tokens of each of these sequences."""
        entries = self._items[item]
        prompt = int(self.answers.prompt_lengths[entries[0]])
        lengths = [int(self.answers.lengths[entry]) for entry in entries]
        return (prompt + sum(lengths),) if self._trees else tuple(prompt + n for n in lengths)

    def collate(self, group: NDArray[np.int64]) -> MicroBatch:
        """Return the tensors of some trees; none give a forward that adds nothing."""
        return collate(self, group, shared=self._trees)


class Scoring:
    """Runs a frozen model forward.

    Args:
        module: a `TokenScorer`, or what was made of one to run on several devices.
        trees: what rows may hold; alone where the module computes no trees.
        tokens: also give the log-prob of every token.
    """

    def __init__(
        self,
        runtime: Runtime,
        module: nn.Module,
        config: TrainingConfig,
        *,
        trees: Sharing | bool,
        tokens: bool = False,
    ):
        self._runtime, self._module, self._trees = runtime, module, trees
        self.tokens = tokens
        automatic = FORWARD_TOKENS.get(runtime.device.type, 8192)
        self.budget = config.most_tokens or automatic

    def lay_out(
        self,
        answers: Answers,
        entries: NDArray[np.int64] | None = None,
        *,
        alone: bool = False,
    ) -> Trees:
        """Return all or some answers laid out for this model, each `alone` in a forward or not."""
        chosen = np.arange(len(answers)) if entries is None else entries
        return Trees(answers, chosen, trees=self._trees, budget=self.budget, alone=alone)

    def __call__(
        self, trees: Trees, groups: Iterable[NDArray[np.int64]]
    ) -> Generator[list[tuple[NDArray[np.int64], Entries]], None, None]:
        """Score groups of trees on this rank; yields for each the answers (indices) and their
        values, in parts where a group had to be cut.

        An empty group is a forward that gives nothing: a sharded model needs every rank in every
        forward, so all ranks are given the same number of groups.
        """
        training = self._module.training
        self._module.eval()
        try:
            yield from in_order(
                lambda group: list(self._score(trees, group)),
                groups,
                lanes(self._module, self._runtime.device),
            )
        finally:
            self._module.train(training)

    def _score(
        self, trees: Trees, group: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], Entries]]:
        if len(group) > 1 and trees.budget > self.budget:
            # Memory ran out before: what was planned larger is cut to what has fitted since.
            pieces = trees.groups(group, self.budget)
        else:
            pieces = [group]
        for piece in pieces:
            try:
                batch, logprobs = self._forward(trees, piece)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                yield from self._smaller(trees, piece, error)
                continue
            if len(piece):
                yield trees.entries(piece), self._entries(trees, piece, batch, logprobs)

    def _smaller(
        self, trees: Trees, group: NDArray[np.int64], error: RuntimeError
    ) -> Iterator[tuple[NDArray[np.int64], Entries]]:
        """Halve the budget for the rest of the pass, and score the group in parts."""
        if len(group) < 2:
            origin = trees.answers.origin(int(trees.entries(group)[0])) if len(group) else "nothing"
            raise UserError(
                f"{origin}: its forward alone does not fit into memory; lower dpo.max_length"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        total = sum(sum(trees.sizes(int(item))) for item in group)
        self.budget = max(1, min(self.budget, total) // 2)
        log.warning("out of memory: forwards of %d tokens from here on", self.budget)
        half = len(group) // 2
        for part in (group[:half], group[half:]):
            yield from self._score(trees, part)

    def pairs(
        self, batches: Iterable[MicroBatch]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Score micro-batches of pairs as training lays them out; yields the pairs and their sums
        (P, 2)."""
        training = self._module.training
        self._module.eval()
        try:
            for batch in batches:
                logprobs = self._run(batch.to(self._runtime.device))
                sums = batch.to(logprobs.device).sums(logprobs)
                yield batch.examples, sums.float().cpu().numpy()
        finally:
            self._module.train(training)

    def _forward(self, trees: Trees, group: NDArray[np.int64]) -> tuple[MicroBatch, Tensor]:
        batch = trees.collate(group).to(self._runtime.device)
        return batch, self._run(batch)

    def _run(self, batch: MicroBatch) -> Tensor:
        with torch.inference_mode(), self._runtime.accelerator.autocast():
            output = self._module(batch.ids, batch.positions, batch.segments, batch.targets)
        return output.logprobs

    def _entries(
        self, trees: Trees, group: NDArray[np.int64], batch: MicroBatch, logprobs: Tensor
    ) -> Entries:
        sums = batch.sums(logprobs).float().cpu().numpy()
        counts = batch.lengths.cpu().numpy()
        entries = trees.entries(group)
        used = np.zeros(counts.shape, bool)
        for row, item in enumerate(group.tolist()):
            used[row, : trees.branches(item)] = True
        tokens = None
        if self.tokens:
            order = torch.argsort(batch.slots, stable=True)
            tokens = logprobs[order].float().cpu().numpy()
        keys = trees.answers.keys[entries]
        return Entries(keys, sums[used], counts[used].astype(np.int32), tokens)


def score_everywhere(
    runtime: Runtime, scoring: Scoring, answers: Answers, entries: NDArray[np.int64] | None = None
) -> Entries:
    """Score all or some answers (ascending indices), shared by the ranks; all get all values.

    Returns:
        The values in the order of `entries`.

    Raises:
        Stopped: a signal asked for it.
    """
    heartbeat.enter("scoring answers")
    trees = scoring.lay_out(answers, entries)
    found = _shared_out(runtime, scoring, trees)
    good = np.isfinite(found.sums)
    if not good.all():
        # One that is not finite may spoil its neighbours in a forward: 0 x inf is not 0.
        rows = np.searchsorted(answers.keys, found.keys[~good])
        again = _shared_out(runtime, scoring, scoring.lay_out(answers, rows, alone=True))
        kept = found.take(np.flatnonzero(good))
        found = concatenate([kept, again], tokens=scoring.tokens)
    # Keys are in the order of the entries, because answers are.
    return found.take(np.argsort(found.keys))


def _shared_out(runtime: Runtime, scoring: Scoring, trees: Trees) -> Entries:
    """Score trees, shared by the ranks in equal numbers of forwards; all get all values, in no
    order."""
    groups = trees.groups()
    groups += [np.zeros(0, np.int64)] * (-len(groups) % runtime.world)
    mine: list[Entries] = []
    failure: Exception | None = None
    groups = groups[runtime.rank :: runtime.world]
    results = scoring(trees, groups)
    for _ in groups:
        with heartbeat.quick("scoring"):
            try:
                mine += [values for _, values in next(results)]
            except Exception as error:
                failure = error
            leaves = consensus.leave(runtime, failure)
        if leaves:
            break
    results.close()
    runtime.raise_together(failure)
    if runtime.stopping:
        consensus.check(runtime, "while it scored, with nothing written")
    everyone = [part for parts in runtime.gather(mine) for part in parts]
    return concatenate(everyone, tokens=scoring.tokens)


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
