"""The verb `plan`: memory, preset, launch line, time and cost of a run, from shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from modern_llm.config.errors import ConfigError
from modern_llm.verbs.settings import Settings
from modern_llm.verbs.stage_settings import PretrainSettings, TrainingSettings
from modern_llm.verbs.stages import StageSpec, read_stage

if TYPE_CHECKING:
    from modern_llm.planning.planner import PlanRequest

Positive = Annotated[int, Field(gt=0)]


class PlanSettings(Settings):
    """Show what a run needs on so many GPUs: bytes by part, preset, launch line, time, cost."""

    example: ClassVar[str] = "modern-llm plan --model runs/sft/last --gpus 8 --gpu_memory 80GB"

    config_is_of_a_stage: ClassVar[bool] = True

    model: str | None = None
    """Hub id, folder, .pt file or run checkpoint (its configuration is read, no weights); or give
    --config."""
    gpus: Positive = 1
    """GPUs over all machines."""
    gpus_per_node: Positive = 8
    """GPUs of one machine."""
    gpu_memory: str = "80GB"
    """Memory of one GPU, such as 80GB or 24GiB."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Dtype of the forward; bf16 by default."""
    weights: Literal["float32", "bfloat16"] | None = None
    """Dtype of the weights, as `train.weights`; float32 by default."""
    optimizer: Literal["adamw", "adamw_8bit", "muon", "adafactor"] | None = None
    """As `train.optimizer`; adamw by default."""
    max_length: Positive | None = None
    """Tokens of prompt and response together; 512 by default."""
    tokens_per_micro_batch: Positive | None = None
    """Tokens of one forward on one GPU; the largest that fits by default."""
    sequence_parallel: Positive | None = None
    """GPUs that share every row, as `train.sequence_parallel`; 1 by default."""
    gradient_checkpointing: bool | Literal["offload"] | None = None
    """Recompute activations; only where it is needed to fit by default."""
    mlp_chunk: Positive | None = None
    """As `train.mlp_chunk`; off by default."""
    steps: Positive | None = None
    """Optimizer steps of the run, for the time."""
    batch_size: Positive | None = None
    """Examples of one step, for the time; 32 by default."""
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
    """Plan a run and show the plan; with `--json` only the result is printed."""
    from modern_llm.planning.outline import outline, outline_of_new
    from modern_llm.planning.planner import plan as make_plan
    from modern_llm.verbs.plan_table import show_plan

    stage, run = (None, None) if settings.config is None else read_stage(settings.config)
    start = stage.checkpoint(run) if stage is not None else None
    model = settings.model or start
    new = run.model if model is None and isinstance(run, PretrainSettings) else None
    if model is None and new is None:
        raise ConfigError(["model: none is named; give --model, or --config of a run"])
    # Before the model is looked for: a wrong option needs no network.
    request = _request(settings, model or "the section model", stage, run)
    shapes, sizes = outline(model) if new is None else outline_of_new(new)
    result = make_plan(shapes, sizes, request)
    if not settings.json_output:
        show_plan(result)
    return result


def _request(
    settings: PlanSettings, model: str, stage: StageSpec | None, run: TrainingSettings | None
) -> PlanRequest:
    """Return what is planned: options of the command line come before those of the run."""
    from modern_llm.planning.planner import PlanRequest, measured_throughput, memory_size

    if settings.measured is not None and settings.tokens_per_second is not None:
        raise ConfigError(["measured and tokens_per_second exclude each other: keep one"])
    rate = settings.tokens_per_second
    if settings.measured is not None:
        rate = measured_throughput(settings.measured)
    train = run.train if run is not None else None
    precision = settings.mixed_precision or (train.precision if train else "bf16")
    offload = settings.gradient_checkpointing == "offload"
    checkpointing = True if offload else settings.gradient_checkpointing
    if checkpointing is None and train is not None and train.gradient_checkpointing:
        # Of `selective` only an upper bound is known.
        checkpointing = train.gradient_checkpointing in (True, "offload")
        offload = train.gradient_checkpointing == "offload"
    # A run is taken to be DPO unless a configuration file says otherwise.
    set_length, default, responses = None, 512, 2
    if stage is not None:
        (set_length, _), default, responses = stage.lengths(run), 1024, stage.responses
    return PlanRequest(
        model=model,
        gpus=settings.gpus,
        gpus_per_node=settings.gpus_per_node,
        gpu_memory=memory_size(settings.gpu_memory),
        precision=precision,
        longest=responses * (settings.max_length or set_length or default),
        checkpointing=checkpointing,
        tokens=settings.tokens_per_micro_batch or (train and train.most_tokens),
        steps=settings.steps or (train and train.max_steps),
        batch_size=settings.batch_size or (train.batch_size if train else 32),
        example_tokens=settings.tokens_per_example,
        tokens_per_second=rate,
        price=settings.price,
        config=str(settings.config) if settings.config else None,
        lora=getattr(run, "lora", None),
        background_saving=train is not None and train.background_saving,
        weights=settings.weights or (train.weights if train else "float32"),
        offload_activations=offload,
        moving_reference=bool(getattr(getattr(run, "dpo", None), "reference_sync_every", None)),
        sequence_parallel=settings.sequence_parallel or (train.sequence_parallel if train else 1),
        optimizer=settings.optimizer or (train.optimizer if train else "adamw"),
        mlp_chunk=settings.mlp_chunk or (train and train.mlp_chunk),
    )
