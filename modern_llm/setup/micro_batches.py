"""Micro-batches of a run: what a row holds, tokens per forward, the share of each rank."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.data import RANDOM
from modern_llm.config.errors import UserError
from modern_llm.data.batch.collate import MicroBatch, collate
from modern_llm.data.batch.micro_batches import BatchSource, largest_example
from modern_llm.data.batch.order import Budget, Order, Sharing
from modern_llm.data.batch.prefix_tree import Examples
from modern_llm.data.table.build import Prepared
from modern_llm.data.table.token_table import TokenTable
from modern_llm.distributed.runtime import Runtime
from modern_llm.models.attention.flex import SIDE
from modern_llm.models.flops import IdealFlops
from modern_llm.models.scorer import TokenScorer

# Tokens of one forward by default. On a CPU small forwards stay in the caches and
# keep few activations (seen with 6 layers of 256: 768 tokens are as fast as 1,600 and take 110 MB
# less; 512 are 9% slower); a GPU wants enough work for every kernel.
AUTO_TOKENS = {"cpu": 768, "cuda": 16_384}
ExcludedRows = tuple[tuple[int, ...], tuple[int, ...]]


class PairCollator:
    """`collate_fn` of a `DataLoader` over the indices of a table of pairs, for a loop of your own.

    Args:
        table: columns `prompt`, `chosen`, `rejected` of int32 token ids, as `prepare_tables` gives.
        scorer: the model that reads the batches, before `accelerator.prepare`; it decides whether
            the answers of a pair share their prompt.
    """

    def __init__(self, table: TokenTable, scorer: TokenScorer):
        self._examples = Examples(table, trees=scorer.capabilities.trees)
        self._shared = sharing(scorer)

    def __call__(self, indices: Sequence[int]) -> MicroBatch:
        """Return the tensors of these P pairs, on the CPU.

        `scorer(batch.ids, batch.positions, batch.segments, batch.targets)` reads them,
        `batch.sums(logprobs)` is (P, 2), `batch.lengths` (P, 2) and `batch.examples` the indices.

        Raises:
            IndexError: an index is outside the table.
        """
        return collate(self._examples, indices, shared=self._shared)


def make_sources(
    runtime: Runtime,
    config: TrainingConfig,
    prepared: Prepared,
    scorer: TokenScorer,
    *,
    group_by_prompt: bool = False,
    left_out: ExcludedRows = ((), ()),
    responses: tuple[str, ...] | None = None,
) -> tuple[BatchSource, BatchSource | None]:
    """Return this rank's sources of training and, where there is some, evaluation data.

    Args:
        group_by_prompt: put training examples with one prompt into one step.
        left_out: rows of the training and of the evaluation data that are never read.
        responses: columns of the responses to compute; by default all.
    """
    train_source = make_source(
        runtime,
        config,
        prepared.train,
        scorer,
        prepared.history,
        group_by_prompt=group_by_prompt,
        left_out=left_out[0],
        by=prepared.order,
        keys=prepared.order_keys(),
        responses=responses,
    )
    if prepared.evaluation is None:
        return train_source, None
    return train_source, make_source(
        runtime, config, prepared.evaluation, scorer, left_out=left_out[1], responses=responses
    )


def make_source(
    runtime: Runtime,
    config: TrainingConfig,
    table: TokenTable,
    scorer: TokenScorer,
    history: tuple[tuple[int, int], ...] | None = None,
    *,
    group_by_prompt: bool = False,
    left_out: tuple[int, ...] = (),
    by: str = RANDOM,
    keys: Any = None,
    responses: tuple[str, ...] | None = None,
) -> BatchSource:
    """Return this rank's source of micro-batches over `table`.

    Args:
        history: (epoch, rows) from which there were so many; all from the start by default.
        by, keys: name of the order and the numbers to sort by, as `Order` has them.
        responses: columns of the responses to compute; by default all.

    Raises:
        UserError: one example alone is above `tokens_per_micro_batch`.
    """
    examples = Examples(table, trees=scorer.capabilities.trees, responses=responses)
    shared = sharing(scorer)
    budget = token_budget(runtime, config, examples, shared=shared)
    groups = examples.prompt_numbers() if group_by_prompt else None
    order = order_of(config, len(table), history, groups, left_out, by, keys)
    return BatchSource(
        examples,
        order,
        budget,
        rank=runtime.data_rank,
        world=runtime.data_world,
        processes=config.sequence_parallel,
        shared=shared,
        # Compiled kernels need few lengths, multiples of one number.
        align=SIDE if scorer.capabilities.backend == "flex" or config.compile else 1,
        flops=partial(IdealFlops(scorer.model), training=True),
        auto=config.most_tokens is None,
    )


def order_of(
    config: TrainingConfig,
    rows: int,
    history: tuple[tuple[int, int], ...] | None = None,
    groups: Any = None,
    left_out: tuple[int, ...] = (),
    by: str = RANDOM,
    keys: Any = None,
) -> Order:
    """Return the order of a table of so many rows; the other arguments as in `make_source`."""
    (_, first), *grown = history or ((0, rows),)
    return Order(first, config.batch_size, config.seed, tuple(grown), groups, left_out, by, keys)


def sharing(scorer: TokenScorer) -> Sharing:
    """Return what rows may hold: one line if attention needs no mask of it."""
    if not scorer.capabilities.trees:
        return Sharing.ALONE
    return Sharing.ROWS if scorer.capabilities.backend == "mask" else Sharing.LINE


def token_budget(
    runtime: Runtime, config: TrainingConfig, examples: Examples, *, shared: Sharing
) -> Budget:
    """Return what one forward may hold: as configured, else by device."""
    count = config.examples_per_micro_batch
    if config.most_tokens is None:
        tokens = None if count is not None else AUTO_TOKENS.get(runtime.device.type, 8192)
        return Budget(tokens=tokens, examples=count)
    tokens, index = largest_example(examples, shared=shared)
    tokens = -(-tokens // config.sequence_parallel)
    if tokens > config.most_tokens:
        raise UserError(
            f"{examples.table.origin(index)}: takes {tokens} tokens, above "
            "train.tokens_per_micro_batch "
            f"{config.most_tokens}: raise it, or lower max_length"
        )
    return Budget(tokens=config.most_tokens, examples=count)
