"""Bytes that one process sends to others in an optimizer step, by kind of collective.

Counted as DDP and DeepSpeed start their collectives; the tests compare message sizes with those of
real engines. A ring sends (W - 1) / W of a message in a gather or a reduction to shards, and twice
that in a reduction to all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from modern_llm.planning.memory import FLOAT32, ITEM, ParallelLayout, Parameter, Sizes

KEPT = 1_000_000_000
"""Elements that ZeRO-3 keeps gathered between forward and backward (`stage3_max_live_parameters`,
`stage3_max_reuse_distance`); a model with more is gathered again."""


def message_bytes(
    parameters: Sequence[Parameter], setting: ParallelLayout, forwards: int
) -> dict[str, int]:
    """Return the bytes of all messages of one kind in an optimizer step, apart from padding.

    Args:
        forwards: micro-batches of the step on one process.
    """
    if setting.world == 1:
        return {}
    trained = sum(p.numel for p in parameters if p.trained)
    if not setting.stage:
        return {"all-reduce": FLOAT32 * trained}
    if setting.stage < 3:
        # Stage 2 reduces after each backward, stage 1 after the last. DeepSpeed reduces buckets to
        # all processes, which keep their shards.
        reduced = forwards if setting.stage == 2 else 1
        sizes = {"all-reduce": reduced * trained, "all-gather": trained}
    else:
        every = sum(p.numel for p in parameters)
        # Recomputation reads what the backward has gathered.
        gathers = 2 if every > KEPT else 1
        sizes = {"all-gather": gathers * forwards * every, "reduce-scatter": forwards * trained}
    return {kind: setting.item * size for kind, size in sizes.items()}


def sent_bytes(
    parameters: Sequence[Parameter], setting: ParallelLayout, forwards: int
) -> dict[str, int]:
    """Return the bytes that one process sends in an optimizer step, by kind of collective."""
    share = (setting.world - 1) / setting.world
    times = {"all-reduce": 2}
    messages = message_bytes(parameters, setting, forwards)
    return {kind: int(times.get(kind, 1) * share * size) for kind, size in messages.items()}


def exchanged_bytes(sizes: Sizes, setting: ParallelLayout) -> int:
    """Return the bytes that one process sends in the attention of one layer in a forward, where
    processes share the rows (`train.sequence_parallel`); its backward sends as many.

    N processes exchange queries, keys, values and the result, and keep 1 / N of each. Key heads are
    repeated until N divides their number.
    """
    parts = setting.sequence_parallel
    key_heads = sizes.kv_heads * parts // math.gcd(sizes.kv_heads, parts)
    each = 2 * (sizes.heads + key_heads) * sizes.head_dim * ITEM[setting.precision]
    return setting.tokens * each * (parts - 1) // parts


def sent_by_attention(sizes: Sizes, setting: ParallelLayout, forwards: int) -> dict[str, int]:
    """Return the bytes that one process sends for the attention in an optimizer step, by kind."""
    if setting.sequence_parallel == 1:
        return {}
    passes = 3 if setting.checkpointing else 2  # recomputation exchanges again
    return {"all-to-all": forwards * passes * sizes.layers * exchanged_bytes(sizes, setting)}
