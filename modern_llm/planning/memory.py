"""Bytes that one process holds, by part, for any model, ZeRO stage, world and token budget.

Parameters, gradients and optimizer states are counted as DeepSpeed and the optimizers lay them out,
padding and small unsharded parameters included: the tests compare them with real engines' tensors.
Activations, head and buffers are estimates of the peak. Pure arithmetic: nothing is loaded.

Letters: W processes, N elements, h hidden width, f width of the MLP, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

FLOAT32 = 4
ITEM = {"no": 4, "fp32": 4, "bf16": 2, "fp16": 2}
NORMS = {(4, 4): 24, (4, 2): 26, (2, 2): 16}
"""Bytes per element of the hidden width that the two norms of a layer keep, by the bytes of a
weight and of an operand of a product: their inputs, normalised inputs and outputs. Norms compute in
float32."""
STATES = 2
"""Gradients as wide as a hidden state that the backward of a layer has at once. Measured: 1.6 of a
row of 65,536 tokens."""
LEAST_8BIT, BLOCK_8BIT, CODES = 4096, 256, 2 * 256 * FLOAT32
"""bitsandbytes: elements of a parameter from which on its moments have 8 bits, elements that share
a scale, and bytes of the two tables of codes."""
# Under stages 1 and 2 a flat buffer of parameters is padded to this many elements times W.
ALIGNMENT = 2
HEAD_CHUNK, HEAD_ROWS = 256 << 20, 1024
"""Bytes of logits, or rows if they are more, that the fused head makes at once on a GPU."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model."""

    shape: tuple[int, ...]
    trained: bool = True
    kind: Literal["layer", "head", "other"] = "other"
    """Matrix of a linear layer, of the head, or something else, such as an embedding."""

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Sizes:
    """Widths of a decoder: its activations depend on them."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Distribution of a run over processes, and what a forward holds."""

    world: int = 1
    stage: int | None = None
    """ZeRO stage; None is one process or DDP."""
    precision: str = "no"
    weights: str = "float32"
    """Dtype of the weights that forwards read without ZeRO (`train.weights`)."""
    optimizer: str = "adamw"
    offload_optimizer: bool = False
    offload_parameters: bool = False
    persistence_threshold: int = 100_000
    """ZeRO-3 keeps parameters of up to so many elements whole (`stage3_param_persistence_...`)."""
    bucket: int = 200_000_000
    """Elements that are reduced together (`reduce_bucket_size`)."""
    sub_group: int = 1_000_000_000
    """Elements that ZeRO-3 steps at once (`sub_group_size`)."""
    reference: bool = False
    """Whether a reference model is loaded beside the policy."""
    sequence_parallel: int = 1
    """Processes that share the rows of a forward."""
    tokens: int = 16_384
    """Tokens of one forward on one process, padding included."""
    targets: int | None = None
    """Target positions among them; by default all."""
    checkpointing: bool = False
    """Whether activations are recomputed in the backward pass."""
    offload_activations: bool = False
    """Whether the inputs that recomputation starts from are in the host's memory."""
    mlp_chunk: int | None = None
    """Tokens that a feed-forward layer computes at a time (`train.mlp_chunk`); all by default."""
    moving_reference: bool = False
    """Whether the reference follows the policy (`dpo.reference_sync_every`)."""
    background_saving: bool = False
    """Whether a copy of weights and moments is written while training continues."""
    row: int | None = None
    """Row length, where attention scores are held whole (the plain CPU kernel with a mask)."""

    @property
    def item(self) -> int:
        """Bytes of one weight in the forward: ZeRO 1 to 3, and `weights`, lower the weights
        themselves."""
        lowered = self.stage or self.weights == "bfloat16"
        return ITEM[self.precision] if lowered else FLOAT32


@dataclass
class Memory:
    """Bytes of one process by part, on its device and in its host's memory."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_total(self) -> int:
        """Bytes on the device at the peak."""
        return sum(self.device.values())


def plan_memory(parameters: Sequence[Parameter], sizes: Sizes, setting: ParallelLayout) -> Memory:
    """Return the bytes of each process right before an optimizer step that is not the first."""
    memory = Memory()
    weights = weight_bytes(parameters, setting)
    (memory.host if setting.offload_parameters else memory.device)["parameters"] = weights
    states = memory.host if setting.offload_optimizer else memory.device
    states["optimizer"] = optimizer_bytes(parameters, setting)
    states["gradients"] = gradient_bytes(parameters, setting)
    if setting.reference:
        memory.device["reference"] = _reference_bytes(parameters, setting)
    if setting.background_saving:
        memory.host["saving"] = _saving_bytes(parameters, setting)
    if setting.moving_reference:
        # The reference, and the policy while the reference is in its place.
        memory.host["reference"] = 2 * _host_copy(parameters, setting.world if setting.stage else 1)
    memory.device["activations"] = activation_bytes(sizes, setting)
    if setting.offload_activations:
        memory.host["activations"] = input_bytes(sizes, setting)
    memory.device["head"] = head_bytes(sizes, setting)
    memory.device["buffers"] = _buffer_bytes(parameters, sizes, setting)
    return memory


def weight_bytes(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    """Bytes of the weights that a forward reads, between two forwards."""
    if setting.stage == 3:
        return setting.item * _sharded(parameters, setting)
    frozen = sum(p.numel for p in parameters if not p.trained)
    if setting.stage in (1, 2):
        return setting.item * (frozen + sum(_padded(g, setting) for g in _groups(parameters)))
    # Weights of 16 bits have the other 16 beside them where they are trained.
    trained = FLOAT32 * sum(p.numel for p in parameters if p.trained)
    return trained + sum(_frozen_bytes(p, setting) for p in parameters if not p.trained)


def _frozen_bytes(parameter: Parameter, setting: ParallelLayout) -> int:
    """Return the bytes of a frozen parameter without ZeRO: products keep what autocast reads."""
    rounded = parameter.kind != "other"
    return parameter.numel * (ITEM[setting.precision] if rounded else setting.item)


def gradient_bytes(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    """Bytes of the reduced gradients before a step: float32 where they are offloaded, and at stages
    2 and 3 in bf16 (`grad_accum_dtype`)."""
    summed = setting.stage in (2, 3) and setting.precision == "bf16"
    item = FLOAT32 if setting.offload_optimizer or summed else setting.item
    if setting.stage == 3:
        return item * sum(
            _ceil(p.numel, setting.world) for group in _groups(parameters) for p in group
        )
    if setting.stage in (1, 2):
        return item * sum(_padded(g, setting) // setting.world for g in _groups(parameters))
    return FLOAT32 * sum(p.numel for p in parameters if p.trained)


def optimizer_bytes(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    """Bytes of the optimizer's state, and of ZeRO's float32 copy of the weights."""
    if setting.stage is None or setting.stage == 0:
        trained = [p for p in parameters if p.trained]
        tables = CODES if setting.optimizer == "adamw_8bit" else 0
        return tables + sum(_state_bytes(p, setting.optimizer) for p in trained)
    flats: list[int] = []
    for group in _groups(parameters):
        if setting.stage == 3:
            flats += _sub_groups(group, setting)
        else:
            flats.append(_padded(group, setting) // setting.world)
    return sum(3 * FLOAT32 * numel + FLOAT32 for numel in flats)


def _state_bytes(parameter: Parameter, optimizer: str) -> int:
    """Return the bytes of the state that an optimizer keeps for a trained parameter."""
    numel, shape = parameter.numel, parameter.shape
    if optimizer == "adamw_8bit" and numel >= LEAST_8BIT:
        return 2 * (numel + FLOAT32 * _ceil(numel, BLOCK_8BIT))
    if optimizer == "muon" and parameter.kind == "layer" and len(shape) == 2:
        return FLOAT32 * numel
    if optimizer == "adafactor":
        sums = numel // shape[-1] + numel // shape[-2] if len(shape) > 1 else numel
        return FLOAT32 * (sums + 1)
    count = 0 if optimizer == "adamw_8bit" else FLOAT32  # a plain integer there
    return 2 * FLOAT32 * numel + count


def activation_bytes(sizes: Sizes, setting: ParallelLayout) -> int:
    """Bytes kept for the backward pass of one forward: an estimate.

    A decoder layer with a gated MLP keeps for each token `NORMS`, the queries and the attention's
    result (2 heads x head_dim), keys and values, and four products of the MLP (4f). With
    `checkpointing` one layer of that, and each layer's input, in the dtype of the weights. With
    `mlp_chunk` the products of the MLP are kept for one piece of one layer.
    """
    width = sizes.heads * sizes.head_dim
    products = 2 * width + 2 * sizes.kv_heads * sizes.head_dim
    inner, at_once, piece = 4 * sizes.mlp, setting.tokens, 0
    if setting.mlp_chunk is not None and setting.mlp_chunk < setting.tokens:
        at_once = setting.mlp_chunk
        inner, piece = 0, ITEM[setting.precision] * inner * at_once
    products += inner
    piece += _in_the_backward(sizes, setting, at_once)
    if setting.row is not None:
        products += 2 * sizes.heads * setting.row
    norms = NORMS[setting.item, ITEM[setting.precision]]
    layer = ITEM[setting.precision] * products + norms * sizes.hidden
    if setting.checkpointing:
        inputs = 0 if setting.offload_activations else input_bytes(sizes, setting)
        return setting.tokens * layer + inputs + piece
    return setting.tokens * layer * sizes.layers + piece


def _in_the_backward(sizes: Sizes, setting: ParallelLayout, at_once: int) -> int:
    """Return the bytes of the gradients of one layer while it is differentiated: of two products of
    the MLP for so many tokens, or of `STATES` hidden states, which is never at the same time."""
    inner = 2 * sizes.mlp * at_once + sizes.hidden * setting.tokens
    return ITEM[setting.precision] * max(inner, STATES * sizes.hidden * setting.tokens)


def input_bytes(sizes: Sizes, setting: ParallelLayout) -> int:
    """Return the bytes of the inputs of all layers, from which recomputation starts."""
    return setting.tokens * sizes.layers * setting.item * sizes.hidden


def head_bytes(sizes: Sizes, setting: ParallelLayout) -> int:
    """Bytes of the fused head at its peak: three chunks of logits, the hidden states of
    the targets and their gradients, and the float32 gradient of the weight."""
    targets = setting.tokens if setting.targets is None else setting.targets
    row = sizes.vocabulary * FLOAT32
    logits = min(max(HEAD_CHUNK, HEAD_ROWS * row), targets * row)
    states = 2 * targets * sizes.hidden * ITEM[setting.precision]
    return 3 * logits + states + sizes.vocabulary * sizes.hidden * FLOAT32


def _reference_bytes(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    if setting.stage is None:
        return sum(_frozen_bytes(p, setting) for p in parameters)
    return setting.item * _sharded(parameters, setting)


def _sharded(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    """Elements under ZeRO-3: equal shares, and small parameters gathered with their padding."""
    shares = [(p.numel, _ceil(p.numel, setting.world)) for p in parameters]
    kept = [share for numel, share in shares if numel <= setting.persistence_threshold]
    return sum(share for _, share in shares) + setting.world * sum(kept)


def _buffer_bytes(parameters: Sequence[Parameter], sizes: Sizes, setting: ParallelLayout) -> int:
    """Return the bytes of gradients under reduction, of the 16-bit copies that autocast makes of
    float32 weights and, with ZeRO-3, of gathered weights."""
    total = sum(p.numel for p in parameters if p.trained)
    if setting.stage in (None, 0):
        # DDP's buckets: gradients that accumulate over forwards without a reduction are apart.
        ddp = setting.world > 1 and setting.stage is None and setting.weights == "float32"
        buckets = FLOAT32 * total if ddp else 0
        return buckets + _cast_bytes(parameters, sizes, setting)
    bucket = setting.item * min(setting.bucket, total)
    if setting.stage < 3:
        # Stage 1 and 2 hold a whole gradient only until its bucket is full.
        return 2 * bucket
    largest = max((p.numel for p in parameters), default=0)
    a_layer = sum(p.numel for p in parameters) - 2 * sizes.vocabulary * sizes.hidden
    live = max(largest, 2 * max(0, a_layer) // max(sizes.layers, 1))
    return bucket + setting.item * live


def _cast_bytes(parameters: Sequence[Parameter], sizes: Sizes, setting: ParallelLayout) -> int:
    """Return the bytes of the matrices as autocast casts them: all but the embedding's table."""
    if setting.item == ITEM[setting.precision]:
        return 0
    # Frozen products are kept as autocast reads them.
    cast = [p for p in parameters if p.trained or p.kind == "other"]
    tables = [p for p in parameters if p.shape == (sizes.vocabulary, sizes.hidden)]
    matrices = sum(p.numel for p in cast if len(p.shape) >= 2)
    embedding = tables[0].numel if len(tables) > 1 else 0  # a tied one is the head's matrix too
    return ITEM[setting.precision] * (matrices - embedding)


def _saving_bytes(parameters: Sequence[Parameter], setting: ParallelLayout) -> int:
    """Return the bytes of float32 weights and two moments: this rank's shards, or all of them on
    the rank that writes."""
    return 3 * _host_copy(parameters, setting.world if setting.stage else 1)


def _host_copy(parameters: Sequence[Parameter], sharers: int) -> int:
    """Return the bytes of one process's share of the trained weights in float32."""
    return sum(FLOAT32 * _ceil(p.numel, sharers) for p in parameters if p.trained)


def _groups(parameters: Iterable[Parameter]) -> list[list[Parameter]]:
    """Return the optimizer's groups: matrices, which decay, and the rest."""
    trained = [p for p in parameters if p.trained]
    groups = ([p for p in trained if len(p.shape) >= 2], [p for p in trained if len(p.shape) < 2])
    return [group for group in groups if group]


def _padded(group: Iterable[Parameter], setting: ParallelLayout) -> int:
    unit = ALIGNMENT * setting.world
    return _ceil(sum(p.numel for p in group), unit) * unit


def _sub_groups(group: Iterable[Parameter], setting: ParallelLayout) -> list[int]:
    """Return this rank's elements in each part of a group that ZeRO-3 steps at once."""
    parts = [0]
    for parameter in group:
        if parts[-1] >= setting.sub_group:
            parts.append(0)
        parts[-1] += _ceil(parameter.numel, setting.world)
    return parts


def _ceil(value: int, by: int) -> int:
    return -(-value // by)
