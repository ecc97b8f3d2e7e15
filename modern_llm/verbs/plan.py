"""The verb `plan`: memory, preset, launch line, time and cost of a run, from shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from modern_llm.config.errors import ConfigError
from modern_llm.verbs.settings import Settings
from modern_llm.verbs.stage_settings import (
    DpoSettings,
    PretrainSettings,
    TrainingSettings,
    read_stage,
)

Positive = Annotated[int, Field(gt=0)]


class PlanSettings(Settings):
    """Tell what a run needs on so many GPUs: bytes by part, preset, launch line, time, cost."""

    config_is_of_a_stage: ClassVar[bool] = True

    model: str | None = None
    """Hub id, folder or .pt file (its configuration is read, no weights); or give --config."""
    gpus: Positive = 1
    """GPUs over all machines."""
    gpus_per_node: Positive = 8
    """GPUs of one machine."""
    gpu_memory: str = "80GB"
    """Memory of one GPU, such as 80GB or 24GiB."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Dtype of the forward; bf16 unless said."""
    max_length: Positive | None = None
    """Tokens of prompt and response together; 512 unless said."""
    tokens_per_micro_batch: Positive | None = None
    """Tokens of one forward; the largest that fits unless said."""
    gradient_checkpointing: bool | None = None
    """Recompute activations; only where it is needed to fit unless said."""
    steps: Positive | None = None
    """Optimizer steps of the run, for the time."""
    batch_size: Positive | None = None
    """Examples of one step, for the time; 32 unless said."""
    tokens_per_example: Annotated[float, Field(gt=0)] | None = None
    """Mean tokens of an example (modern-llm inspect tells them); the longest possible unless
    said."""
    tokens_per_second: Annotated[float, Field(gt=0)] | None = None
    """Throughput over all GPUs, for the time."""
    measured: Path | None = None
    """A run folder whose logged throughput is taken."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Price of one GPU for one hour, for the cost."""


def plan(settings: PlanSettings) -> dict[str, Any]:
    """Plan, show the plan unless `--json` asks for it alone."""
    from modern_llm.planning.outline import outline, outline_of_new
    from modern_llm.planning.planner import plan as make_plan
    from modern_llm.verbs.plan_table import show_plan

    stage = read_stage(settings.config)[1] if settings.config is not None else None
    wish = _wish(settings, stage)
    if settings.model is None and isinstance(stage, PretrainSettings):
        shapes, sizes = outline_of_new(stage.model)
    else:
        shapes, sizes = outline(wish.model)
    result = make_plan(shapes, sizes, wish)
    if not settings.json_output:
        show_plan(result)
    return result


def _model(settings: PlanSettings, stage: TrainingSettings | None) -> str:
    found = (
        settings.model
        or getattr(stage, "sft_checkpoint", None)
        or getattr(stage, "pretrain_checkpoint", None)
    )
    if found is None and isinstance(stage, PretrainSettings):
        return "the section model"
    if found is None:
        raise ConfigError(["model: none is named; give --model, or --config of a run"])
    return found


def _wish(settings: PlanSettings, stage: TrainingSettings | None) -> Any:
    from modern_llm.planning.planner import PlanRequest, measured_throughput, memory_size

    if settings.measured is not None and settings.tokens_per_second is not None:
        raise ConfigError(["measured and tokens_per_second exclude each other: keep one"])
    rate = settings.tokens_per_second
    if settings.measured is not None:
        rate = measured_throughput(settings.measured)
    train = stage.train if stage is not None else None
    precision = settings.mixed_precision or (train.precision if train else "bf16")
    checkpointing = settings.gradient_checkpointing
    if checkpointing is None and train is not None and train.gradient_checkpointing:
        # Of `selective` only an upper bound is known.
        checkpointing = train.gradient_checkpointing is True
    return PlanRequest(
        model=_model(settings, stage),
        gpus=settings.gpus,
        gpus_per_node=settings.gpus_per_node,
        gpu_memory=memory_size(settings.gpu_memory),
        precision=precision,
        longest=_longest(settings, stage),
        checkpointing=checkpointing,
        tokens=settings.tokens_per_micro_batch or (train and train.most_tokens),
        steps=settings.steps or (train and train.max_steps),
        batch_size=settings.batch_size or (train.batch_size if train else 32),
        example_tokens=settings.tokens_per_example,
        tokens_per_second=rate,
        price=settings.price,
        config=str(settings.config) if settings.config else None,
        lora=getattr(stage, "lora", None),
        background_saving=train is not None and train.background_saving,
    )


def _longest(settings: PlanSettings, stage: TrainingSettings | None) -> int:
    """Tokens of the longest example: both answers of a pair stand in one row with their prompt."""
    if isinstance(stage, PretrainSettings):
        return settings.max_length or stage.model.max_seq_len
    if stage is None or isinstance(stage, DpoSettings):
        return 2 * (settings.max_length or (stage.dpo.max_length if stage else 512))
    return settings.max_length or stage.data.max_length or 1024  # type: ignore[attr-defined]
