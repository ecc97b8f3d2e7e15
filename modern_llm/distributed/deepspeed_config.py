"""Check of the DeepSpeed JSON of `accelerate launch` against the run's configuration.

The run sets batch sizes, learning rates, clipping and precision; the JSON sets sharding and
offloading. A setting with different values in both is refused. Unknown top-level keys are refused
here, because DeepSpeed silently ignores them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import ConfigError, close_to
from modern_llm.storage.untrusted import read_json

# Top-level keys that do not change what a run computes. Excluded on purpose: pipelines, curricula,
# sparse attention, autotuning and elastic batch sizes.
KNOWN = frozenset(
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer "
    "scheduler gradient_clipping fp16 bf16 torch_autocast data_types zero_optimization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type aio "
    "prescale_gradients gradient_predivide_factor steps_per_print wall_clock_breakdown "
    "memory_breakdown comms_logger flops_profiler dump_state log_level disable_python_gc".split()
)
# Set by the run: micro-batches here have a number of tokens, not of examples, and the loop does the
# division, so DeepSpeed gets 1 for each.
COUNTED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def read_file(path: str) -> dict[str, Any]:
    """Return the content of a DeepSpeed JSON, or raise `ConfigError` naming file and place."""
    try:
        content = read_json(path)
    except OSError as error:
        raise ConfigError(
            [f"deepspeed_config_file {path}: {error.strerror}; give its path from where you start"]
        ) from error
    except ValueError as error:
        raise ConfigError([f"{path}: not JSON: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: must be one JSON object of sections"])
    return content


def resolve(content: dict[str, Any], config: TrainingConfig, place: str) -> dict[str, Any]:
    """Return the complete DeepSpeed configuration, with the settings of the run filled in.

    Args:
        content: the JSON as read; it is not changed.
        place: its path, for messages.

    Raises:
        ConfigError: unknown keys, contradictions and impossible settings, all at once.
    """
    problems = [
        *_unknown_keys(content),
        *_contradictions(content, config),
        *_impossible(content, config),
    ]
    if problems:
        raise ConfigError([f"{place}: {problem}" for problem in problems])
    result = copy.deepcopy(content)
    for name in (*COUNTED, "optimizer", "scheduler"):
        result.pop(name, None)
    stage = stage_of(result)
    result |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Stage 0 clips only in mixed precision; the engine's wrapper clips there.
        "gradient_clipping": (config.max_grad_norm or 0.0) if stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        # True would replace AdamW by the compiled CPU Adam, whose decay is coupled once rebuilt.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": float("inf"),
    }
    for name in ("bf16", "fp16"):
        enabled = config.precision == name and stage > 0 and not _autocast(result)
        result[name] = {**result.get(name, {}), "enabled": enabled}
    if stage in (2, 3):
        zero = result["zero_optimization"]
        # Reduce gradients while the backward computes; DeepSpeed's default at stage 2 is off.
        zero.setdefault("overlap_comm", True)
        if result["bf16"]["enabled"]:
            # Else micro-batches are summed in bfloat16, which loses small gradients. Stage 1 sums
            # in the gradients themselves: there DeepSpeed would take another optimizer class.
            result["data_types"] = {"grad_accum_dtype": "fp32", **result.get("data_types", {})}
    # The default. Without it a non-finite gradient would be applied in bfloat16.
    result["bf16"]["check_grad_overflow"] = True
    if config.precision == "bf16" and stage == 0:
        # Stage 0 shards nothing: float32 weights and autocast, as with DDP.
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return result


def reference_config(content: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a frozen model's engine from the policy's resolved `content`.

    Always ZeRO-3, because a frozen model has nothing but weights to shard. Precision and offloading
    are the policy's.
    """
    zero = content["zero_optimization"]
    kept = {name: value for name, value in zero.items() if name.startswith("stage3_")}
    result = {name: content[name] for name in ("bf16", "fp16", "torch_autocast") if name in content}
    result |= {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": float("inf"),
        "zero_optimization": {"stage": 3, **kept},
    }
    if stage_of(content) == 3 and "offload_param" in zero:
        result["zero_optimization"]["offload_param"] = zero["offload_param"]
    return result


def stage_of(content: dict[str, Any]) -> int:
    """Return the ZeRO stage."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def _autocast(content: dict[str, Any]) -> bool:
    return bool(content.get("torch_autocast", {}).get("enabled", False))


def _unknown_keys(content: dict[str, Any]) -> Iterator[str]:
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    yield from _unknown("", content, KNOWN)
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for path, model in models.items():
        section = value_at(content, path)
        if section is None:
            continue
        if not isinstance(section, dict):
            yield f"{path}: must be an object, got {section!r}"
            continue
        names = {field.alias or name for name, field in model.model_fields.items()}
        yield from _unknown(f"{path}.", section, frozenset(names))


def _unknown(prefix: str, section: dict[str, Any], known: frozenset[str]) -> Iterator[str]:
    for name in section:
        if name not in known:
            hint = close_to(name, sorted(known), prefix)
            yield f"{prefix}{name}: unknown key{hint}; remove it"


def _contradictions(content: dict[str, Any], config: TrainingConfig) -> Iterator[str]:
    """Yield a message for each setting that differs between the JSON and the run."""
    autocast_dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(config.precision, "float32")
    wanted = {
        # path in the JSON: (field of train, its value)
        "train_batch_size": ("batch_size", config.batch_size),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", config.micro_batch_size),
        "gradient_accumulation_steps": (
            "gradient_accumulation_steps",
            config.gradient_accumulation_steps,
        ),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm or 0.0),
        "optimizer.type": ("(always)", "AdamW"),
        "optimizer.params.lr": ("learning_rate", config.learning_rate),
        "optimizer.params.weight_decay": ("weight_decay", config.weight_decay),
        "optimizer.params.eps": ("adam_epsilon", config.adam_epsilon),
        "optimizer.params.betas": ("adam_beta1/2", [config.adam_beta1, config.adam_beta2]),
        "scheduler.type": ("schedule", config.schedule),
        "zero_force_ds_cpu_optimizer": ("(always torch.optim.AdamW)", False),
        "bf16.enabled": ("mixed_precision", config.precision == "bf16"),
        "fp16.enabled": ("mixed_precision", config.precision == "fp16"),
        "bf16.check_grad_overflow": ("on_nonfinite (gradients are always checked)", True),
    }
    if _autocast(content):
        wanted["torch_autocast.dtype"] = ("mixed_precision", autocast_dtype)
    for path, (field, value) in wanted.items():
        given = value_at(content, path)
        if given is None or given == "auto" or given == value:
            continue
        shown = config.mixed_precision if field == "mixed_precision" else value
        yield (
            f"{path} {given!r} contradicts train.{field} {shown!r}: the run's configuration "
            'decides; remove the key, or write "auto"'
        )


def value_at(content: Any, path: str) -> Any:
    """Return the value at a dotted path into nested objects, or None."""
    for part in path.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _impossible(content: dict[str, Any], config: TrainingConfig) -> Iterator[str]:
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        stage = zero.get("stage") if isinstance(zero, dict) else zero
        yield f"zero_optimization.stage: must be 0, 1, 2 or 3, got {stage!r}"
        return
    stage = zero["stage"]
    lowest = {"offload_optimizer": 1, "offload_param": 3}
    for name, needed in lowest.items():
        device = (zero.get(name) or {}).get("device", "none") if zero.get(name) else "none"
        if device == "nvme":
            yield (
                f"zero_optimization.{name}.device nvme: checkpoints read and write the state in "
                "memory; use cpu"
            )
        elif device != "none" and stage < needed:
            yield (f"zero_optimization.{name}: needs stage {needed} or above, and stage is {stage}")
    if stage == 1 and value_at(content, "data_types.grad_accum_dtype") == "fp32":
        yield (
            "data_types.grad_accum_dtype fp32 at stage 1: DeepSpeed then takes another optimizer, "
            "which this engine does not know; remove it, or use stage 2, where it is the default"
        )
    if stage == 3 and config.compile:
        yield (
            "zero_optimization.stage 3 gathers weights in hooks that a compiled layer does not "
            "run: set train.compile false, or use stage 2"
        )
    if stage == 0 and config.precision == "fp16":
        yield "zero_optimization.stage 0 has no loss scaler here: use stage 1, or DDP"
