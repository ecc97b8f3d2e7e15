"""The twin: a small model of the same architecture that exercises every feature in short rows.

A sliding window of 4,096 positions or a soft cap of 30 has no effect in short rows of a new model.
The twin has the model's configuration and random weights, with few and narrow layers (at least one
of each kind), windows and other special lengths of 12 to 23 tokens, large logits and no constant
weights. A feature that is exact on the twin in rows of a few hundred tokens is exact on the model
at its own lengths. The probe costs the same for a model of any size.

Field names never decide whether a feature exists: they only propose values to reduce, and a
proposal is kept if the architecture still builds and runs.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from modern_llm.models.routers import without_router_loss

log = logging.getLogger(__name__)

# Tokens of the row with which a twin is tried.
LONGEST = 256
FIRST_LENGTH = 12
MOST_PARAMETERS = 20_000_000
VOCABULARY = 256
FEW_LAYERS = 4
HEADS = 4
# Standard deviation of the twin's logits. Those of a new model are near 0, where caps do nothing.
LOGITS = 15.0
# Fields for the width of a layer, with the twin's values.
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "ffn_dim": 96, "n_inner": 96, "word_embed_proj_dim": 64,
    "embedding_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "qk_head_dim": 32, "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 4, "mamba_d_state": 8, "mamba_dt_rank": 8, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "state_size": 8, "ssm_state_size": 8, "n_groups": 1, "lru_width": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY, "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 96, "decoder_ffn_dim": 96, "d_ff": 96, "global_head_dim": 16,
}  # fmt: skip
# Parts of the names of integers that are not lengths.
NO_LENGTHS = ("token", "_id", "vocab", "position", "layer", "seed", "rope", "version")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one core: small products are slower on several, which wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def twin_of(model: PreTrainedModel, parts: int = 1) -> PreTrainedModel | None:
    """Return the twin in float32 on the CPU, in evaluation mode; None if it cannot be built.

    Args:
        parts: number that divides its heads.
    """
    kind = type(model)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(0)
        try:
            config = _fewer_layers(kind, _plain_copy(model.config))
            for narrow in _narrower(config, math.lcm(HEADS, parts)):
                twin = _at_work(kind, narrow)
                if twin is not None:
                    _enliven(twin)
                    return twin if _runs(twin) else None
        except Exception as error:  # the model's code may raise anything
            log.debug("no twin of %s: %s", kind.__name__, error)
    return None


def _at_work(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel | None:
    """Build with short lengths and weights at which layers act; None if that does not run."""
    base = _built(kind, config)
    if base is None or base.num_parameters() > MOST_PARAMETERS:
        return None
    shapes = [tuple(p.shape) for p in base.parameters()]
    count = len(list(_lengths(config)))

    def built(chosen: list[int], *, loud: bool = True) -> PreTrainedModel | None:
        changed = _shorter(_louder(config) if loud else config, chosen)
        model = _built(kind, changed, "cpu")
        if model is None:
            return None
        # Only an untied head may add a shape.
        found = [tuple(p.shape) for p in model.parameters()]
        same = found in (shapes, [*shapes, shapes[0]]) or sorted(found) == sorted(shapes)
        return model.eval() if same and _runs(model) else None

    for loud in (True, False):
        model = built(list(range(count)), loud=loud)
        if model is not None:
            return model
    kept: list[int] = []
    for at in range(count):
        if built([*kept, at]) is not None:
            kept.append(at)
    return built(kept) or built(kept, loud=False)


def _plain_copy(config: PretrainedConfig) -> PretrainedConfig:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _built(
    kind: type[PreTrainedModel], config: PretrainedConfig, device: str = "meta"
) -> PreTrainedModel | None:
    """Build from the class: `from_config` would shard the model under ZeRO-3."""
    try:
        with torch.device(device):
            return kind(copy.deepcopy(config)).float()
    except Exception as error:  # the model's code may raise anything
        log.debug("%s: %s", kind.__name__, error)
        return None


def _runs(model: PreTrainedModel) -> bool:
    """Whether a row of the probe's length gives finite logits."""
    ids = torch.arange(3, 3 + LONGEST)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        logits = model(input_ids=ids, use_cache=False, **without_router_loss(model)).logits
    except Exception as error:  # the model's code may raise anything
        log.debug("%s: %s", type(model).__name__, error)
        return False
    return bool(torch.isfinite(logits).all())


def _set(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a copy with other values of the text model's fields."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, value in changes.items():
        with suppress(AttributeError):  # a property, computed from other fields
            setattr(text, name, value)
    return config


def _fewer_layers(kind: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig:
    """Keep the first layers that contain one of each kind, or all if the kinds are unknown."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    whole = _built(kind, config)
    kinds = [] if whole is None else _kinds(whole, text, count)
    if len(kinds) != count:
        return config
    for kept in range(max(2, max(map(kinds.index, kinds)) + 1), count):
        lists = {
            name: value[:kept]
            for name, value in vars(text).items()
            if isinstance(value, list) and len(value) == count
        }
        fewer = _set(config, lists | {"num_hidden_layers": kept})
        built = _built(kind, fewer)
        if built is not None and set(_kinds(built, fewer.get_text_config(), kept)) == set(kinds):
            return fewer
    return config


def fewer_layers(kind: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig | None:
    """Return the configuration of the first layers, one of each kind; None if that is every layer
    of a model with more than `FEW_LAYERS`."""
    fewer = _fewer_layers(kind, _plain_copy(config))
    kept, count = (c.get_text_config().num_hidden_layers for c in (fewer, config))
    return fewer if kept < count or count <= FEW_LAYERS else None


def _kinds(model: PreTrainedModel, text: PretrainedConfig, count: int) -> list[str]:
    """Describe each layer by its modules, their settings, and its entries in the configuration's
    lists."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        return []
    own = [v for _, v in sorted(vars(text).items()) if isinstance(v, list) and len(v) == count]
    return [
        "; ".join([*map(_signature, layer.modules()), *(str(value[at]) for value in own)])
        for at, layer in enumerate(lists[0])
    ]


def _signature(module: nn.Module) -> str:
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and "idx" not in name
    }
    shapes = [tuple(p.shape) for p in module.parameters(recurse=False)]
    return f"{type(module).__name__}{sorted(settings.items(), key=str)}{shapes}"


def _narrower(config: PretrainedConfig, heads_of: int) -> Iterator[PretrainedConfig]:
    """Yield configurations to try: `WIDTHS`, a share of the original widths, unchanged."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    ends = {"vocab_size": VOCABULARY, "max_position_embeddings": 2 * LONGEST}
    every = WIDTHS | ends | {"num_attention_heads": heads_of}
    widths = {n: v for n, v in every.items() if _positive(getattr(text, n, None))}
    if isinstance(groups, int):
        widths["num_key_value_heads"] = {heads: heads_of, 1: 1}.get(groups, 2)
    shares: list[dict[str, Any]] = [widths]
    for share in (16, 8, 4, 3, 2):
        fields = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        values = {n: getattr(text, n, None) for n in fields}
        if all(_positive(v) and v % share == 0 for v in values.values()):
            part = {n: v // share for n, v in values.items()}
            shares.append({n: v for n, v in widths.items() if n in ends} | part)
    shares.append({n: v for n, v in widths.items() if n in ends})
    for changes in shares:
        yield _safe_ids(_set(config, changes))
    yield config


def _safe_ids(config: PretrainedConfig) -> PretrainedConfig:
    """Replace special ids outside the small vocabulary."""
    text = config.get_text_config()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(text, name, None)
        if isinstance(value, list) or (isinstance(value, int) and value >= text.vocab_size):
            setattr(text, name, 0 if name == "pad_token_id" else 1)
    return config


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shorter(config: PretrainedConfig, chosen: list[int]) -> PretrainedConfig:
    """Return a copy with short values, not all equal, for the chosen lengths."""
    config = copy.deepcopy(config)
    setters = list(_lengths(config))
    for at in chosen:
        setters[at](FIRST_LENGTH + at % 12)
    return config


def _lengths(config: PretrainedConfig) -> Iterator[Callable[[int], None]]:
    """Yield a setter of each integer in the configuration that may be a length in tokens."""

    def inside(holder: Any, prefix: str) -> Iterator[Callable[[int], None]]:
        items = vars(holder) if isinstance(holder, PretrainedConfig) else holder
        pairs = enumerate(items) if isinstance(items, list) else list(items.items())
        for name, value in pairs:
            label = f"{prefix}{name}".lower()
            if any(part in label for part in NO_LENGTHS) or label in WIDTHS:
                continue
            if isinstance(value, PretrainedConfig | dict | list):
                yield from inside(value, "" if isinstance(value, PretrainedConfig) else label)
            elif _positive(value) and FIRST_LENGTH < value:
                yield _setter(holder, name)

    yield from inside(config.get_text_config(), "")


def _setter(holder: Any, name: Any) -> Callable[[int], None]:
    def change(value: int) -> None:
        if isinstance(holder, PretrainedConfig):
            setattr(holder, name, value)
        else:
            holder[name] = value

    return change


def _louder(config: PretrainedConfig) -> PretrainedConfig:
    """Set initial weights at which layers act, and untie the head."""
    text = config.get_text_config()
    changes: dict[str, Any] = {"tie_word_embeddings": False}
    if isinstance(getattr(text, "initializer_range", None), float):
        changes["initializer_range"] = 1.2 * text.hidden_size**-0.5
    louder = _set(config, changes)
    louder.tie_word_embeddings = False
    return louder


def _enliven(model: PreTrainedModel) -> None:
    """Randomise constant weights (gates at 0, norms at 1), and scale the head for large logits."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and float(parameter.std()) < 1e-6:
            size = 0.2 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5
            parameter += size * torch.randn(parameter.shape)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)
    if isinstance(weight, Tensor) and weight is not embedding.weight:
        ids = torch.arange(3, 67)[None]
        output = model(input_ids=ids, use_cache=False, **without_router_loss(model))
        spread = float(output.logits.std())
        if spread > 0:
            weight *= min(LOGITS / spread, 100.0)
