"""Memory, launch command, time and cost of a run, before anything is loaded or rented.

Shapes come from the model's configuration, bytes from `planning.memory`; time only from a
throughput that was measured or is given.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from modern_llm.config import LoraConfig
from modern_llm.config.errors import ConfigError, UserError
from modern_llm.planning.communication import sent_by_attention, sent_bytes
from modern_llm.planning.memory import ParallelLayout, Parameter, Sizes, plan_memory
from modern_llm.storage.untrusted import finite, json_lines

USABLE = 0.9
"""Share of a GPU's memory that is planned with: the rest is CUDA's context and fragments."""
STEP = 1024
MOST_TOKENS = 65_536
LONG_ROW_CHUNK = 8192
"""`train.mlp_chunk` that is proposed: pieces large enough to keep a GPU busy."""
UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12}


@dataclass(frozen=True)
class Preset:
    """A file of `accelerate_configs/`, its variant for several machines, and its layout."""

    file: str
    several_nodes: str | None
    setting: dict[str, Any]


# From the fastest to the one that needs least memory.
PRESETS = {
    "ddp": Preset("ddp.yaml", None, {"stage": None}),
    "zero1": Preset("zero1.yaml", None, {"stage": 1}),
    "zero2": Preset("zero2.yaml", "multi_node_zero2.yaml", {"stage": 2}),
    "zero3": Preset("zero3.yaml", "multi_node_zero3.yaml", {"stage": 3}),
    "zero3_offload": Preset(
        "zero3_offload.yaml",
        None,
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The run to plan.

    Attributes:
        gpu_memory: bytes of one GPU.
        longest: tokens of the longest example in one forward, which a budget must hold.
        steps, batch_size, example_tokens: of the run, where known; `example_tokens` is the mean.
        tokens_per_second: over all GPUs, measured or given.
        price: of one GPU for one hour.
    """

    model: str
    gpus: int
    gpus_per_node: int
    gpu_memory: int
    precision: str
    longest: int
    checkpointing: bool | None = None
    tokens: int | None = None
    steps: int | None = None
    batch_size: int | None = None
    example_tokens: float | None = None
    tokens_per_second: float | None = None
    price: float | None = None
    config: str | None = None
    lora: LoraConfig | None = None
    background_saving: bool = False
    weights: str = "float32"
    optimizer: str = "adamw"
    offload_activations: bool = False
    moving_reference: bool = False
    sequence_parallel: int = 1
    mlp_chunk: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.lora is not None and self.lora.quantize is not None:
            problems.append(
                "lora.quantize: quantized weights are not counted; leave it out to plan"
            )
        if self.price is not None and self.tokens_per_second is None:
            problems.append("price has no effect without a throughput: give tokens_per_second")
        if self.tokens_per_second is not None and self.steps is None:
            problems.append(
                "tokens_per_second needs the length of the run: give steps, or a --config that "
                "has max_steps"
            )
        if self.nodes > 1 and (self.weights != "float32" or self.optimizer != "adamw"):
            problems.append(
                f"weights {self.weights} and optimizer {self.optimizer} need "
                "accelerate_configs/ddp.yaml, which has no variant for several machines to plan "
                "with: leave them out, or plan one machine"
            )
        if self.gpus % self.gpus_per_node and self.gpus > self.gpus_per_node:
            problems.append(
                f"gpus {self.gpus} is no multiple of gpus_per_node {self.gpus_per_node}: change one"
            )
        if self.gpus % self.sequence_parallel:
            problems.append(
                f"sequence_parallel {self.sequence_parallel} does not divide the {self.gpus} GPUs: "
                "change one"
            )
        if problems:
            raise ConfigError(problems)

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, self.gpus // self.gpus_per_node)


def memory_size(text: str) -> int:
    """Return the bytes of e.g. `80GB`, `24GiB`, `80` (GB).

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise ConfigError([f"gpu_memory {text!r} is no size: write e.g. 80GB or 24GiB"])
    return int(float(found[1]) * UNITS[found[2].upper()])


def measured_throughput(run: Path) -> float:
    """Return the median tokens per second of a run folder's log.

    Raises:
        UserError: nothing was logged there.
    """
    try:
        lines = json_lines(run / "metrics.jsonl")
        found = (finite(v.get("tokens_per_second")) for _, v in lines if isinstance(v, dict))
        rates = [rate for rate in found if rate]
    except OSError as error:
        raise UserError(f"measured {run}: no metrics of a run there ({error})") from error
    if not rates:
        raise UserError(f"measured {run}: no tokens_per_second was logged there")
    return float(statistics.median(rates))


def plan(
    shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], request: PlanRequest
) -> dict[str, Any]:
    """Return the plan.

    Args:
        shapes: of every parameter by name.
        sizes: as `Sizes` takes them.

    Returns:
        `rows` (one for each preset, with the reference cached and live: bytes by part, whether it
        fits, the largest token budget, and `sent`, the bytes that a GPU sends in a step of one
        forward by kind), `recommended`, `launch`, `fits_with` (options with which it would fit, if
        nothing fits), and, where a throughput is known,
        `seconds` and `cost`.
    """
    parameters = with_adapters(shapes, request.lora)
    planner = _Planner(parameters, Sizes(**sizes), request)
    rows = [planner.row(name, live) for name in planner.presets() for live in (False, True)]
    best = next(filter(_is_choice, rows), None)
    result: dict[str, Any] = {
        "model": request.model,
        "parameters": sum(p.numel for p in parameters),
        "trained": sum(p.numel for p in parameters if p.trained),
        "gpus": request.gpus,
        "gpu_memory": request.gpu_memory,
        "usable": int(USABLE * request.gpu_memory),
        "precision": request.precision,
        "rows": rows,
        "recommended": best and best["preset"],
        "tokens_per_micro_batch": best and best["tokens"],
        "gradient_checkpointing": best and best["checkpointing"],
        "launch": best and _launch(request, best),
        "fits_with": None if best else _what_would_fit(parameters, Sizes(**sizes), request),
    }
    return result | _time(request)


def _is_choice(row: dict[str, Any]) -> bool:
    return row["fits"] and row["reference"] == "cache"


def _what_would_fit(
    parameters: Sequence[Parameter], sizes: Sizes, request: PlanRequest
) -> str | None:
    """Return the options with which rows as long as these fit, the cheapest first; None if none."""
    chunk = request.mlp_chunk or LONG_ROW_CHUNK
    for parts in (1, 2, 4, 8):
        if request.gpus % parts or sizes.heads % parts:
            continue
        asked = replace(request, mlp_chunk=chunk, sequence_parallel=parts)
        planner = _Planner(parameters, sizes, asked)
        if any(_is_choice(planner.row(name, False)) for name in planner.presets()):
            split = f" --sequence_parallel {parts}" if parts > 1 else ""
            return f"--mlp_chunk {chunk}{split}"
    return None


def with_adapters(shapes: dict[str, tuple[int, ...]], lora: LoraConfig | None) -> list[Parameter]:
    """Return the parameters of a run: all trained or, with adapters, these beside frozen ones."""
    if lora is None:
        return [Parameter(shape, kind=_kind(name, shapes)) for name, shape in shapes.items()]
    parameters = []
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        saved = any(module.endswith(wanted) for wanted in lora.modules_to_save)
        # These variants need the base in float32.
        whole = lora.dora or lora.target_parameters
        kind = "other" if whole else _kind(name, shapes)
        parameters.append(Parameter(shape, trained=False, kind=kind))
        if saved:
            parameters.append(Parameter(shape))
        elif _has_adapter(module, shape, lora.targets):
            pair = (lora.rank, shape[1]), (shape[0], lora.rank)
            parameters += [Parameter(of, kind="layer") for of in pair]
    return parameters


def _kind(name: str, shapes: dict[str, tuple[int, ...]]) -> Literal["layer", "head", "other"]:
    """Return the kind of a parameter by its name, as the names of `transformers` tell it."""
    module = name.rpartition(".")[0]
    is_linear = len(shapes.get(f"{module}.weight", ())) == 2
    if not is_linear or any(part in module for part in ("embed", "wte", "wpe")):
        return "other"
    return "head" if module.endswith("lm_head") else "layer"


def _has_adapter(module: str, shape: tuple[int, ...], targets: str | list[str]) -> bool:
    if len(shape) != 2:
        return False
    if targets == "all-linear":
        return not any(part in module for part in ("embed", "lm_head", "wte", "wpe"))
    return any(module == name or module.endswith(f".{name}") for name in targets)


class _Planner:
    def __init__(self, parameters: Sequence[Parameter], sizes: Sizes, request: PlanRequest):
        self._parameters, self._sizes, self._request = parameters, sizes, request
        self._usable = int(USABLE * request.gpu_memory)
        longest = -(-request.longest // request.sequence_parallel)
        self._least = -(-max(longest, STEP) // STEP) * STEP
        if sizes.heads % request.sequence_parallel:
            raise UserError(
                f"sequence_parallel {request.sequence_parallel} does not divide the {sizes.heads} "
                f"attention heads of {request.model}: use a divisor"
            )

    def presets(self) -> list[str]:
        """Return the presets that run on this number of machines."""
        several = self._request.nodes > 1
        whole = self._request.weights != "float32" or self._request.optimizer != "adamw"
        names = ["ddp"] if whole else list(PRESETS)  # sharded weights refuse both options
        return [n for n in names if not several or PRESETS[n].several_nodes]

    def row(self, name: str, live: bool) -> dict[str, Any]:
        """Return the plan of one preset: without recomputation if that fits, else with it."""
        fixed = self._request.checkpointing
        for checkpointing in [fixed] if fixed is not None else [False, True]:
            tokens = self._tokens(name, live, checkpointing)
            if tokens is not None:
                break
        setting = self._layout(name, live, checkpointing, tokens or self._least)
        memory = plan_memory(self._parameters, self._sizes, setting)
        return {
            "preset": name,
            "reference": "model" if live else "cache",
            "fits": tokens is not None,
            "tokens": tokens,
            "checkpointing": checkpointing,
            "device": memory.device,
            "device_total": memory.device_total,
            "host": memory.host,
            "sent": sent_bytes(self._parameters, setting, 1)
            | sent_by_attention(self._sizes, setting, 1),
        }

    def _tokens(self, name: str, live: bool, checkpointing: bool) -> int | None:
        """Return the largest token budget that fits; None if the longest example does not."""
        tokens = self._request.tokens
        if tokens is not None:
            return tokens if self._fits(name, live, checkpointing, tokens) else None
        low, high = self._least, max(self._least, MOST_TOKENS)
        if not self._fits(name, live, checkpointing, low):
            return None
        while low < high:  # memory grows with the budget
            middle = low + -(-(high - low) // (2 * STEP)) * STEP
            if self._fits(name, live, checkpointing, middle):
                low = middle
            else:
                high = middle - STEP
        return low

    def _fits(self, name: str, live: bool, checkpointing: bool, tokens: int) -> bool:
        setting = self._layout(name, live, checkpointing, tokens)
        found = plan_memory(self._parameters, self._sizes, setting)
        return found.device_total <= self._usable

    def _layout(self, name: str, live: bool, checkpointing: bool, tokens: int) -> ParallelLayout:
        setting = ParallelLayout(
            world=self._request.gpus,
            precision=self._request.precision,
            # With adapters the reference is the policy with its adapters switched off.
            reference=live and self._request.lora is None,
            tokens=tokens,
            checkpointing=checkpointing,
            background_saving=self._request.background_saving,
            weights=self._request.weights,
            optimizer=self._request.optimizer,
            moving_reference=self._request.moving_reference,
            sequence_parallel=self._request.sequence_parallel,
            offload_activations=checkpointing and self._request.offload_activations,
            mlp_chunk=self._request.mlp_chunk,
        )
        return replace(setting, **PRESETS[name].setting)


def _launch(request: PlanRequest, row: dict[str, Any]) -> str:
    """Return the launch command, to be run on every machine."""
    preset = PRESETS[row["preset"]]
    file = preset.file if request.nodes == 1 else preset.several_nodes
    if request.gpus == 1 and row["preset"] == "ddp":
        file = "single_gpu.yaml"
    words = ["accelerate launch", f"--config_file accelerate_configs/{file}"]
    words.append(f"--num_processes {request.gpus}")
    if request.nodes > 1:
        words.append(f"--num_machines {request.nodes} --machine_rank $RANK_OF_THIS_MACHINE")
        words.append("--main_process_ip $FIRST_MACHINE --main_process_port 29500")
    words.append(f"-m modern_llm dpo --config {request.config or 'run.yaml'}")
    words.append(f"--train.mixed_precision {request.precision}")
    words.append(f"--train.tokens_per_micro_batch {row['tokens']}")
    if row["checkpointing"]:
        mode = "offload" if request.offload_activations else "true"
        words.append(f"--train.gradient_checkpointing {mode}")
    if request.sequence_parallel > 1:
        words.append(f"--train.sequence_parallel {request.sequence_parallel}")
    if request.mlp_chunk is not None:
        words.append(f"--train.mlp_chunk {request.mlp_chunk}")
    if request.weights != "float32":
        words.append(f"--train.weights {request.weights}")
    if request.optimizer != "adamw":
        words.append(f"--train.optimizer {request.optimizer}")
    return " ".join(words)


def _time(request: PlanRequest) -> dict[str, Any]:
    """Return seconds and cost of the run; None if no throughput is known."""
    if request.tokens_per_second is None or request.steps is None:
        return {"seconds": None, "cost": None, "tokens": None}
    assert request.batch_size is not None, "a run of known length has a batch size"
    # Without a measured mean every example counts as the longest: an upper bound.
    each = request.example_tokens or request.longest
    tokens = request.steps * request.batch_size * each
    seconds = tokens / request.tokens_per_second
    cost = None if request.price is None else seconds / 3600 * request.gpus * request.price
    return {
        "tokens": int(tokens),
        "seconds": round(seconds, 1),
        "cost": None if cost is None else round(cost, 2),
        "upper_bound": request.example_tokens is None,
    }
