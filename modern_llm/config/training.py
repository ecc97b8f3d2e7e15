"""`TrainingConfig`: how a stage trains, the same fields for every stage."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from modern_llm.config.base import Accepted, Fixed, Free, SameContent, section
from modern_llm.config.printable import one_line

Positive = Annotated[int, Field(gt=0)]
Tracker = Literal[
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "aim",
    "clearml",
    "dvclive",
    "swanlab",
]


LOWER_IS_BETTER = ("loss", "perplexity")
HIGHER_IS_BETTER = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen")
"""Metrics by which one evaluation is better than another, for `best_metric`."""
LONGEST_NAME = 200
"""Bytes of a run's name: a file's name has 255, and the ending and temporary marks need some."""


def _file_name(name: str) -> str:
    """Return a run's name, or refuse one that cannot be part of a file's name everywhere."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > LONGEST_NAME:
        raise ValueError(f"has {size} bytes and names a folder: use at most {LONGEST_NAME}")
    if "/" in name or "\\" in name:
        raise ValueError("names a folder and holds / or \\: use a name without")
    if name.startswith("."):
        raise ValueError("names a folder and begins with a dot, as temporary ones do: leave it out")
    if one_line(name) != name:
        raise ValueError(
            f"holds a control character or space that does not show ({one_line(name)!r}): "
            "use plain text"
        )
    return name


@section
class TrainingConfig:
    """Options of one training run. `batch_size` counts the examples of one optimizer step over all
    processes."""

    run_name: Fixed[Annotated[str, Field(min_length=1), AfterValidator(_file_name)]]
    """Names the final folder: `output_dir/{run_name}_final`. At most 200 bytes of UTF-8, without
    separators, control characters and a dot at its start."""
    dataset_name: SameContent[str | None] = None
    """Training data of pretraining, and of the other stages where their data section names none."""
    tokenizer_name: SameContent[str | None] = None
    """Hub id or folder of the tokenizer; SFT and DPO take the checkpoint's own where it has one."""
    output_dir: Free[Path]
    """The run folder: configuration, metrics, checkpoints and the final model."""

    batch_size: Fixed[Positive] = 32
    """Examples (pairs, answers, rows of documents) in one optimizer step over the whole world."""
    micro_batch_size: Free[Positive | None] = None
    """Most examples in one forward on one process."""
    gradient_accumulation_steps: Free[Positive | None] = None
    """Forwards of one optimizer step on one process; more processes share them.
    batch_size = micro_batch_size x gradient_accumulation_steps."""
    tokens_per_micro_batch: Free[Positive | Literal["auto"]] = "auto"
    """Most tokens in one forward on one process, padding included. auto: what the device is fast
    with, halved and kept where the first steps run out of memory."""

    max_steps: Accepted[Positive | None] = None
    """Optimizer steps; excludes epochs."""
    epochs: Accepted[Annotated[float, Field(gt=0)] | None] = None
    """Epochs of the data; 1 if neither this nor max_steps is set."""
    learning_rate: Accepted[Annotated[float, Field(gt=0)] | None] = None
    """Peak learning rate; by default 3e-4 in pretraining, 2e-5 in SFT and 5e-6 in DPO and KTO."""
    schedule: Accepted[Literal["cosine", "linear", "constant"]] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: Accepted[Annotated[int, Field(ge=0)]] = 0
    """Steps in which the rate rises linearly to its peak."""
    warmup_ratio: Accepted[Annotated[float, Field(ge=0, le=1)] | None] = None
    """The same as a share of all steps, rounded up; excludes warmup_steps."""
    min_learning_rate_ratio: Accepted[Annotated[float, Field(ge=0, le=1)]] = 0.0
    """Rate at the end of the decay as a share of the peak."""
    weight_decay: Accepted[Annotated[float, Field(ge=0)]] = 0.01
    """Decoupled decay of the weights of matrix products, convolutions and embeddings; biases, norms
    and parameters of state spaces have none, whatever their shape."""
    optimizer: Fixed[Literal["adamw", "adamw_8bit", "muon", "adafactor"]] = "adamw"
    """adamw_8bit keeps AdamW's moments in 8 bits (bitsandbytes); muon makes the updates of the
    layers' matrices orthogonal, at AdamW's scale, and leaves the rest to AdamW; adafactor keeps
    sums of rows and columns instead of moments, and its rate is a share of each weight's size.
    All but adamw need one process or DDP."""
    adam_beta1: Accepted[Annotated[float, Field(ge=0, lt=1)]] = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Accepted[Annotated[float, Field(ge=0, lt=1)]] = 0.95
    """Decay of AdamW's second moment."""
    adam_epsilon: Accepted[Annotated[float, Field(gt=0)]] = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: Accepted[Annotated[float, Field(gt=0)] | None] = 1.0
    """Gradient norm above which the gradient is scaled down; null switches that off."""
    router_loss_coefficient: Accepted[Annotated[float, Field(ge=0)] | None] = None
    """Weight of the routers' load-balancing loss in the gradient of a model with experts, logged
    apart as aux_loss (`loss` is without it). Unless set: the checkpoint's own weight where its
    configuration has output_router_logits true, else 0."""
    on_nonfinite: Free[Literal["stop", "skip"]] = "stop"
    """What a step does whose loss or gradient is not finite: stop the run (status 4), or be passed
    over and counted as skipped_steps; the third in a row stops the run in any case. Nothing of it
    is applied, and its examples are written down."""
    skip_loss_spikes: Accepted[Annotated[float, Field(ge=0)]] = 0.0
    """Standard deviations above the running mean of the last 100 steps from which on the loss of a
    step is a spike: its update is not applied and it is counted as skipped_spikes, two in a row at
    most and none of the first 20. 0 applies every step. Not with fp16, whose scaler would take such
    a step for an overflow. Costs a reduction of the loss in every step."""

    weights: Accepted[Literal["float32", "bfloat16"]] = "float32"
    """Dtype of the weights that forwards read. bfloat16 keeps the other 16 bits of each trained
    weight apart, so that updates are those of float32: 4 bytes a weight in all, and activations
    half as large. Needs mixed_precision bf16, and one process or DDP: ZeRO does the same itself."""
    mixed_precision: Accepted[Literal["no", "fp32", "bf16", "fp16"]] = "no"
    """Dtype of the forward: float32 ("no", "fp32"), bfloat16 or float16 (GPU only).
    Weights that are trained stay float32, see `weights`."""
    gradient_checkpointing: Free[bool | Literal["selective", "offload"]] = False
    """Recompute activations in the backward pass: less memory, about a third more time. selective
    keeps the results of matrix products and attention: less is saved, little is made again. offload
    keeps the layers' inputs in the host's memory (GPU only): least memory for long rows."""
    sequence_parallel: Free[Positive] = 1
    """Processes that share every row (Ulysses): each computes a part of its tokens, and in the
    attention a part of the heads, whose number must be a multiple of it. For rows that are too long
    for one device's memory. The number of processes is a multiple of it too; a forward of such a
    group has so many times tokens_per_micro_batch."""
    mlp_chunk: Free[Positive | None] = None
    """Tokens that a feed-forward layer computes at a time, and again in the backward pass: long
    rows then hold its inner products for so many tokens alone. 8192 suits rows of 32,000 tokens and
    more; off by default."""
    compile: Free[bool] = False
    """`torch.compile` the decoder layers."""
    attention: Free[Literal["auto", "tree", "separate", "blocks", "flex", "mask"]] = "auto"
    """Pairs share their prompt (tree), one row an answer (separate), or as probed at load (auto).
    Trees by parts of rows (blocks, CPU), FlexAttention (flex, CUDA) or a dense mask (mask): the
    fastest that is exact on this device unless named."""
    attn_implementation: Free[Literal["eager", "sdpa"] | None] = None
    """Kernel of the model itself for separate rows, as `transformers` names it; needs attention:
    separate. By default the model's own choice."""
    hang_timeout: Free[Annotated[float, Field(gt=0)] | None] = 600.0
    """Seconds without progress after which a process that others wait for counts as hung, if that
    is also 10 times its own longest silence in that phase; what has no measure (loading, compiling,
    the first forward of a kind) gets an hour more. All processes then write their stacks and end
    with status 5. One process alone is warned with its stacks and never ended. null watches
    nothing."""
    seed: Fixed[Annotated[int, Field(ge=0, lt=2**63)]] = 42
    """Names the order of the data, the initial weights and every random draw."""

    log_every: Free[Positive] = 10
    """Steps between lines on the console and in metrics.jsonl."""
    profile_steps: Free[Annotated[int, Field(ge=0)]] = 0
    """Trace this many steps of rank 0 with torch.profiler into the run folder, and print the
    largest costs."""
    trackers: Free[list[Tracker]] = Field(default_factory=list)
    """Experiment trackers that get every logged metric: tensorboard, wandb, trackio, mlflow,
    comet_ml, aim, clearml, dvclive, swanlab."""
    tracker_project: Free[Annotated[str, Field(min_length=1)]] = "modern-llm"
    """Project (of mlflow: experiment) that the trackers file this run under; those that write into
    the run folder (tensorboard) need none."""
    generate_every: Free[Positive | None] = None
    """Steps between sample answers to fixed prompts, written to samples.jsonl after those of the
    start; off by default."""
    generate_prompts: Free[list[str] | None] = None
    """The prompts; by default the first three of the held-out (else training) examples."""
    generate_tokens: Free[Positive] = 128
    """Most tokens of a sample answer."""
    eval_every: Free[Positive] = 500
    """Steps between evaluations; none runs without evaluation data. One runs at the end in any
    case."""
    save_every: Free[Positive] = 500
    """Steps between checkpoints; one is written at the end of training only as the final model."""
    keep_checkpoints: Free[Positive] = 2
    """Newest checkpoints that are kept."""
    keep_best: Free[bool] = False
    """Save after each evaluation that is the best so far, and keep that checkpoint beside the
    newest ones, as output_dir/best. The final model is still that of the last step."""
    best_metric: Free[str | None] = None
    """Metric of the evaluations that decides which is the best: eval/loss by default;
    eval/perplexity, and in DPO and KTO eval/rewards/margins, eval/rewards/chosen, eval/logps/chosen
    and, of pairs, eval/rewards/accuracies. Losses and perplexity are better when lower, the others
    when higher."""
    early_stopping_patience: Accepted[Positive | None] = None
    """Evaluations in a row that are not better than the best one, after which the run ends; off by
    default."""
    background_saving: Free[bool] = False
    """Copy the state into the host's memory (12 bytes a trained parameter, shared by the processes
    under ZeRO) and write it while training continues, one checkpoint at a time. The last one before
    a stop is written at once."""
    resume: Free[Literal["auto", "must", "never"]] = "auto"
    """auto: resume from the newest checkpoint in output_dir if there is one; must: refuse to start
    without one; never: refuse an output_dir that holds a run."""
    accept_change: Free[bool] = False
    """Resume the run in output_dir although settings differ that change the rest of it (learning
    rate, steps, paths of the same data); applies to this start only (--accept-change)."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: object) -> object:
        # YAML 1.1 reads a bare `no` as false.
        return "no" if value is False else value

    @field_validator("tokens_per_micro_batch", mode="before")
    @classmethod
    def _nothing_is_auto(cls, value: object) -> object:
        return "auto" if value is None else value

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        problems = [
            text
            for bad, text in (*self._rules(), *self._split_rules(), *self._update_rules())
            if bad
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        micro, accumulation = self.micro_batch_size, self.gradient_accumulation_steps
        both = micro is not None and accumulation is not None
        return [
            (
                both and micro * accumulation != self.batch_size,
                f"micro_batch_size {micro} x gradient_accumulation_steps {accumulation} is not "
                "batch_size "
                f"{self.batch_size}: change one, or leave one out (both count for one process)",
            ),
            (
                micro is not None and micro > self.batch_size,
                f"micro_batch_size {micro} is above batch_size {self.batch_size}: lower it",
            ),
            (
                not both and accumulation is not None and accumulation > self.batch_size,
                f"gradient_accumulation_steps {accumulation} is above batch_size "
                f"{self.batch_size}: lower it",
            ),
            (
                self.attn_implementation is not None and self.attention != "separate",
                f"attn_implementation {self.attn_implementation} has no effect with attention "
                f"{self.attention}, which may replace it: set attention to separate",
            ),
            (
                self.mlp_chunk is not None and self.compile,
                "mlp_chunk and compile exclude each other: the compiler would make a graph for "
                "every number of pieces; keep one",
            ),
            (
                self.mlp_chunk is not None and self.gradient_checkpointing == "selective",
                "mlp_chunk and gradient_checkpointing selective exclude each other: the second "
                "keeps the products that the first does not; use true",
            ),
            (
                self.generate_every is None and self.generate_prompts is not None,
                "generate_prompts has no effect without generate_every: set it",
            ),
            (
                self.best_metric is not None and not self.follows_evaluation,
                "best_metric has no effect without keep_best or early_stopping_patience: set one",
            ),
            (
                len(set(self.trackers)) < len(self.trackers),
                "trackers names one twice: name each once",
            ),
            (
                self.max_steps is not None and self.epochs is not None,
                "max_steps and epochs exclude each other: keep one",
            ),
            (
                self.warmup_ratio is not None and self.warmup_steps > 0,
                f"warmup_ratio {self.warmup_ratio} and warmup_steps {self.warmup_steps} exclude "
                "each other: keep one",
            ),
            (
                self.max_steps is not None and self.warmup_steps > self.max_steps,
                f"warmup_steps {self.warmup_steps} is above max_steps {self.max_steps}: lower it",
            ),
        ]

    def _split_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of rows that processes share."""
        parts = self.sequence_parallel
        return [
            (
                parts > 1 and self.attention == "separate",
                f"sequence_parallel {parts} needs the tree attention, got attention separate: use "
                "auto",
            ),
            (
                parts > 1 and self.compile,
                f"sequence_parallel {parts} and compile exclude each other: keep one",
            ),
        ]

    def _update_rules(self) -> list[tuple[bool, str]]:
        """Return the rules of what a step does with its gradient."""
        return [
            (
                self.schedule == "constant" and self.min_learning_rate_ratio > 0,
                "min_learning_rate_ratio has no effect with schedule constant: remove one",
            ),
            (
                self.skip_loss_spikes > 0 and self.precision == "fp16",
                "skip_loss_spikes and mixed_precision fp16 exclude each other: the loss scaler "
                "would take a skipped step for an overflow; use bf16",
            ),
            (
                self.weights == "bfloat16" and self.precision != "bf16",
                f"weights bfloat16 needs mixed_precision bf16, got {self.mixed_precision}: set it",
            ),
            (
                self.optimizer == "adafactor" and self._sets_adam,
                "adam_beta1, adam_beta2 and adam_epsilon have no effect with optimizer adafactor: "
                "remove them",
            ),
        ]

    @property
    def _sets_adam(self) -> bool:
        """Whether a setting of AdamW differs from its default."""
        names = ("adam_beta1", "adam_beta2", "adam_epsilon")
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        return any(getattr(self, name) != fields[name] for name in names)

    def warmup_of(self, total: int) -> int:
        """Return the steps of the warm-up of a run with `total` steps."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        # The margin: 0.07 * 100 is 7.000000000000001, and 7 steps are meant.
        return math.ceil(self.warmup_ratio * total - 1e-9)

    @property
    def follows_evaluation(self) -> bool:
        """Whether the run depends on which evaluation is the best, and so needs evaluation data."""
        return self.keep_best or self.early_stopping_patience is not None

    @property
    def examples_per_micro_batch(self) -> int | None:
        """Most examples in one forward on one process, or None where only tokens bound it."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        if self.gradient_accumulation_steps is not None:
            return -(-self.batch_size // self.gradient_accumulation_steps)
        return None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens in one forward on one process, or None if it is chosen by the run."""
        said = self.tokens_per_micro_batch
        return None if said == "auto" else said

    @property
    def precision(self) -> Literal["no", "bf16", "fp16"]:
        """Mixed precision in Accelerate's words."""
        return "no" if self.mixed_precision == "fp32" else self.mixed_precision
