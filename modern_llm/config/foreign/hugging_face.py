"""Options of `transformers.TrainingArguments`, which TRL and LLaMA-Factory share."""

from __future__ import annotations

from modern_llm.config.foreign.rows import BATCH, BEST, Row

ROWS = {
    "output_dir": Row("train.output_dir", "text"),
    "run_name": Row("train.run_name", "file_name"),
    "per_device_train_batch_size": Row("train.batch_size", "batch", BATCH),
    "gradient_accumulation_steps": Row("train.batch_size", "batch", BATCH),
    "num_train_epochs": Row("train.epochs", "epochs"),
    "max_steps": Row("train.max_steps", "positive"),
    "learning_rate": Row("train.learning_rate", "number"),
    "lr_scheduler_type": Row("train.schedule", "schedule"),
    "lr_scheduler_kwargs": Row("train.min_learning_rate_ratio", "schedule_options"),
    "warmup_steps": Row("train.warmup_steps", "warmup"),
    "warmup_ratio": Row("train.warmup_ratio", "ratio"),
    "weight_decay": Row("train.weight_decay", "number"),
    "adam_beta1": Row("train.adam_beta1", "adam"),
    "adam_beta2": Row("train.adam_beta2", "adam"),
    "adam_epsilon": Row("train.adam_epsilon", "adam"),
    "max_grad_norm": Row("train.max_grad_norm", "grad_norm"),
    "bf16": Row("train.mixed_precision", "bf16"),
    "fp16": Row("train.mixed_precision", "fp16"),
    "activation_checkpointing": Row("train.gradient_checkpointing", "flag"),
    "gradient_checkpointing": Row("train.gradient_checkpointing", "recompute"),
    "torch_compile": Row("train.compile", "flag"),
    "logging_steps": Row("train.log_every", "every"),
    "report_to": Row("train.trackers", "trackers"),
    "project": Row("train.tracker_project", "text"),
    "eval_steps": Row("train.eval_every", "every", "an evaluation also runs at the end"),
    "eval_strategy": Row("train.eval_every", "strategy"),
    "evaluation_strategy": Row("train.eval_every", "strategy"),
    "save_steps": Row("train.save_every", "every"),
    "save_strategy": Row("train.save_every", "strategy"),
    "save_total_limit": Row("train.keep_checkpoints", "positive"),
    "load_best_model_at_end": Row("train.keep_best", "flag", BEST),
    "metric_for_best_model": Row("train.best_metric", "best_metric"),
    "seed": Row("train.seed"),
    "optim": Row("train.optimizer", "optimizer"),
}

NOT_NEEDED = {
    "the launcher chooses it: accelerate launch --config_file accelerate_configs/zero2.yaml": (
        "deepspeed fsdp fsdp_config accelerator_config parallelism_config local_rank use_cpu "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend"
    ),
    "a hung process is found by train.hang_timeout, which adapts to the run's own speed": (
        "ddp_timeout"
    ),
    "the same command resumes a run; --resume refuses to start a new one": (
        "resume_from_checkpoint overwrite_output_dir"
    ),
    "the verb says what is done": "do_train do_eval do_predict",
    "columns that the format does not read are ignored, and the log names them": (
        "remove_unused_columns label_names"
    ),
    "batches are prepared in the background": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order"
    ),
    "sums are divided once, by the count over all processes": "average_tokens_across_devices",
    "micro-batches are made by tokens (train.tokens_per_micro_batch), also in evaluation": (
        "per_device_eval_batch_size eval_accumulation_steps auto_find_batch_size "
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object batch_eval_metrics"
    ),
    "logits are never held whole; fast kernels are chosen by a test against the model": (
        "use_liger_kernel liger_kernel_config use_cache"
    ),
    "every logged step is in metrics.jsonl and on one console line": (
        "logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica "
        "log_on_each_node disable_tqdm include_num_input_tokens_seen include_for_metrics "
        "skip_memory_metrics"
    ),
    "modern-llm export --push_to_hub uploads a model": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push "
        "hub_revision"
    ),
    "a checkpoint holds what a resume needs, and its manifest is written last": (
        "save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint save_safetensors"
    ),
    "the metric says whether lower or higher is better": "greater_is_better",
    "train.seed names the order of the data too": "data_seed",
    "set by the tracker's own environment variables": (
        "trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
}

NO_EQUIVALENT = {
    "an optimizer has no further options": "optim_args optim_target_modules",
    "the backend and mode of the compiler are not options": (
        "torch_compile_backend torch_compile_mode"
    ),
    "how activations are recomputed is fixed": (
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs"
    ),
    "the order of the data depends on the seed alone, not on lengths": (
        "train_sampling_strategy length_column_name group_by_length"
    ),
    "an epoch uses every example; its last step may be smaller": "dataloader_drop_last",
    "the first evaluation runs after train.eval_every steps": "eval_on_start eval_delay",
    "the loss takes no such term": "neftune_noise_alpha label_smoothing_factor",
    "evaluation uses the precision of training": "bf16_full_eval fp16_full_eval",
    "torch's own setting is used": "tf32 torch_empty_cache_steps full_determinism debug",
}

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
}
