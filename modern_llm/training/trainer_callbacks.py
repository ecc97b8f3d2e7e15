"""Adapter for callbacks written for `transformers.Trainer`.

They see a `TrainerState`, the settings of this run under the names of `TrainingArguments`, and
metrics named as there (`eval_loss`). What this loop cannot do for them is refused when they are
given, not ignored.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modern_llm.config import TrainingConfig
from modern_llm.config.errors import UserError

CALLED = frozenset(
    "on_init_end on_train_begin on_epoch_begin on_step_end on_epoch_end on_log on_evaluate on_save "
    "on_train_end".split()
)


def is_trainer_callback(callback: Any) -> bool:
    """Whether this is an object of `transformers.TrainerCallback`, without importing it."""
    module = sys.modules.get("transformers.trainer_callback")
    return module is not None and isinstance(callback, module.TrainerCallback)


def adapted(callback: Any) -> _Adapter:
    """Return a callback of this package that calls one of `transformers.Trainer`.

    Raises:
        UserError: it has a method that this loop never calls, or does what is an option here.
    """
    from transformers import EarlyStoppingCallback, TrainerCallback

    kind = type(callback)
    if isinstance(callback, EarlyStoppingCallback):
        raise UserError(
            "callbacks: EarlyStoppingCallback is not used here: set train.early_stopping_patience, "
            "which is part of the checkpoints"
        )
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    own = {name for name in events if getattr(kind, name) is not getattr(TrainerCallback, name)}
    if missing := sorted(own - CALLED):
        raise UserError(
            f"callbacks: {kind.__name__}.{missing[0]} is not among the events of this loop: "
            f"{', '.join(sorted(CALLED))}"
        )
    return _Adapter(callback)


class Arguments(SimpleNamespace):
    """Settings of a run under the names of `TrainingArguments`."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"args.{name}: a callback of transformers gets no such setting here; it has "
            f"{', '.join(sorted(vars(self)))}"
        )


class _Adapter:
    """Calls a `TrainerCallback` at the places of `Callback`."""

    def __init__(self, callback: Any):
        self._callback = callback
        self._state: Any = None
        self._args: Any = None
        self._epoch = 0

    def on_train_begin(self, state: Any, control: Any) -> None:
        """Make what the callback sees, and begin the first epoch of this start."""
        from transformers import TrainerState

        self._args = _arguments(state)
        self._state = TrainerState(
            max_steps=state.total,
            logging_steps=state.config.log_every,
            eval_steps=state.config.eval_every,
            save_steps=state.config.save_every,
            log_history=[],
            is_local_process_zero=state.local_rank == 0,
            is_world_process_zero=state.is_main,
        )
        self._epoch = int(state.epoch)
        self._call("on_init_end", state, control)
        self._call("on_train_begin", state, control)
        self._call("on_epoch_begin", state, control)

    def on_step_end(self, state: Any, control: Any) -> None:
        """End an epoch, and begin the next, where its last step was done."""
        self._call("on_step_end", state, control)
        if int(state.epoch) > self._epoch:
            self._epoch = int(state.epoch)
            self._call("on_epoch_end", state, control)
            if state.step < state.total:
                self._call("on_epoch_begin", state, control)

    def on_log(self, state: Any, control: Any, metrics: dict[str, float]) -> None:
        """Pass the metrics of a line on as `logs`."""
        self._state.log_history.append({**metrics, "step": state.step})
        self._call("on_log", state, control, logs=dict(metrics))

    def on_evaluate(self, state: Any, control: Any, metrics: dict[str, float]) -> None:
        """Pass the metrics of an evaluation on: `eval/loss` as `eval_loss`."""
        named = {name.replace("eval/", "eval_", 1): value for name, value in metrics.items()}
        self._state.log_history.append({**named, "step": state.step})
        self._call("on_evaluate", state, control, metrics=named)

    def on_checkpoint(self, state: Any, control: Any, folder: Path) -> None:
        """Report a complete checkpoint."""
        self._call("on_save", state, control)

    def on_train_end(self, state: Any, control: Any) -> None:
        """Report the end."""
        self._call("on_train_end", state, control)

    def _call(self, event: str, state: Any, control: Any, **more: Any) -> None:
        from transformers import TrainerControl

        self._state.global_step, self._state.epoch = state.step, state.epoch
        wishes = TrainerControl()
        given = {"model": state.model, "optimizer": state.optimizer, "lr_scheduler": None}
        given |= {"processing_class": None, "train_dataloader": None, "eval_dataloader": None}
        method = getattr(self._callback, event)
        wishes = method(self._args, self._state, wishes, **given, **more) or wishes
        for wish, instead in (
            ("should_log", "set train.log_every"),
            ("should_epoch_stop", "set should_training_stop"),
        ):
            if getattr(wishes, wish):
                raise UserError(
                    f"callbacks: {type(self._callback).__name__}.{event} set {wish}, which this "
                    f"loop does not do: {instead}"
                )
        if wishes.should_training_stop:
            control.stop(type(self._callback).__name__)
        if wishes.should_save:
            control.save()
        if wishes.should_evaluate:
            control.evaluate()


def _arguments(state: Any) -> Arguments:
    config: TrainingConfig = state.config
    accumulation = config.gradient_accumulation_steps or 1
    return Arguments(
        output_dir=str(config.output_dir),
        run_name=config.run_name,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.schedule,
        max_steps=state.total,
        num_train_epochs=config.epochs or 1,
        logging_steps=config.log_every,
        eval_steps=config.eval_every,
        save_steps=config.save_every,
        save_total_limit=config.keep_checkpoints,
        logging_strategy="steps",
        eval_strategy="steps",
        save_strategy="steps",
        seed=config.seed,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        gradient_checkpointing=bool(config.gradient_checkpointing),
        per_device_train_batch_size=max(1, config.batch_size // (accumulation * state.world)),
        gradient_accumulation_steps=accumulation,
        report_to=list(config.trackers),
        process_index=state.rank,
        local_process_index=state.local_rank,
        world_size=state.world,
        disable_tqdm=True,
    )
