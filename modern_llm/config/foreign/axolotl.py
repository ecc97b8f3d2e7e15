"""Options of Axolotl's YAML files."""

from __future__ import annotations

from modern_llm.config.foreign.rows import (
    BATCH,
    BEST,
    CHECKPOINT,
    FIXED_DROPOUT,
    LENGTH,
    TEMPLATE,
    Row,
)

ROWS = {
    "base_model": Row(CHECKPOINT, "text"),
    "tokenizer_config": Row("tokenizer_name", "text"),
    "output_dir": Row("train.output_dir", "text"),
    "micro_batch_size": Row("train.batch_size", "batch", BATCH),
    "gradient_accumulation_steps": Row("train.batch_size", "batch", BATCH),
    "batch_size": Row("train.batch_size", "batch", BATCH),
    "num_epochs": Row("train.epochs", "epochs"),
    "max_steps": Row("train.max_steps", "positive"),
    "learning_rate": Row("train.learning_rate", "number"),
    "lr_scheduler": Row("train.schedule", "schedule"),
    "cosine_min_lr_ratio": Row("train.min_learning_rate_ratio", "number"),
    "warmup_steps": Row("train.warmup_steps", "warmup"),
    "warmup_ratio": Row("train.warmup_ratio", "ratio"),
    "optimizer": Row("train.optimizer", "optimizer"),
    "weight_decay": Row("train.weight_decay", "number"),
    "adam_beta1": Row("train.adam_beta1", "adam"),
    "adam_beta2": Row("train.adam_beta2", "adam"),
    "adam_epsilon": Row("train.adam_epsilon", "adam"),
    "adam_eps": Row("train.adam_epsilon", "adam"),
    "max_grad_norm": Row("train.max_grad_norm", "grad_norm"),
    "bf16": Row("train.mixed_precision", "bf16"),
    "bfloat16": Row("train.mixed_precision", "bf16"),
    "fp16": Row("train.mixed_precision", "fp16"),
    "float16": Row("train.mixed_precision", "fp16"),
    "activation_offloading": Row("train.gradient_checkpointing", "offloaded"),
    "gradient_checkpointing": Row("train.gradient_checkpointing", "recompute"),
    "torch_compile": Row("train.compile", "flag"),
    "load_best_model_at_end": Row("train.keep_best", "flag", BEST),
    "metric_for_best_model": Row("train.best_metric", "best_metric"),
    "early_stopping_patience": Row("train.early_stopping_patience", "positive"),
    "seed": Row("train.seed"),
    "logging_steps": Row("train.log_every", "every"),
    "save_steps": Row("train.save_every", "every"),
    "save_strategy": Row("train.save_every", "strategy"),
    "save_total_limit": Row("train.keep_checkpoints", "positive"),
    "eval_steps": Row("train.eval_every", "every", "an evaluation also runs at the end"),
    "eval_strategy": Row("train.eval_every", "strategy"),
    "evaluation_strategy": Row("train.eval_every", "strategy"),
    "saves_per_epoch": Row("train.save_every", "per_epoch"),
    "evals_per_epoch": Row("train.eval_every", "per_epoch"),
    "sequence_len": Row(
        LENGTH, "same", "an over-long prompt loses its start, then the response its end"
    ),
    "max_prompt_len": Row(
        "dpo.max_prompt_length|data.max_prompt_length|model.max_seq_len",
        "not_pretrain",
        "the prompt's tokens that are kept at least, not at most",
    ),
    "datasets": Row("data.sources", "axolotl_sources"),
    "pretraining_dataset": Row("data.sources", "axolotl_sources"),
    "test_datasets": Row("data.eval_dataset_name", "axolotl_evaluation"),
    "val_set_size": Row("data.eval_fraction", "share"),
    "chat_template": Row("data.template", "template", TEMPLATE),
    "chat_template_jinja": Row("data.template", "not_pretrain"),
    "rl": Row("dpo.loss_type", "axolotl_rl"),
    "rl_beta": Row("dpo.beta", "number"),
    "dpo_beta": Row("dpo.beta", "number"),
    "kto_desirable_weight": Row("kto.desirable_weight", "number"),
    "kto_undesirable_weight": Row("kto.undesirable_weight", "number"),
    "dpo_label_smoothing": Row("dpo.label_smoothing", "smoothing"),
    "dpo_loss_type": Row("dpo.loss_type", "loss_type"),
    "dpo_loss_weights": Row("dpo.loss_weights", "loss_weights"),
    "dpo_use_weighting": Row("dpo.use_weighting", "flag"),
    "orpo_alpha": Row("dpo.beta", "number", "beta weighs the odds term of orpo"),
    "simpo_gamma": Row("dpo.simpo_gamma", "simpo"),
    "cpo_alpha": Row("dpo.nll_coefficient", "number"),
    "rpo_alpha": Row("dpo.nll_coefficient", "number"),
    "adapter": Row("lora", "adapters"),
    "lora_r": Row("lora.rank", "lora"),
    "lora_alpha": Row("lora.alpha", "lora"),
    "lora_dropout": Row("lora.dropout", "lora_dropout", FIXED_DROPOUT),
    "lora_target_modules": Row("lora.targets", "lora_targets"),
    "lora_target_linear": Row("lora.targets", "lora_all_linear"),
    "peft_use_dora": Row("lora.dora", "lora_flag"),
    "peft_use_rslora": Row("lora.rslora", "lora_flag"),
    "peft_layers_to_transform": Row("lora.layers", "lora_layers"),
    "lora_target_parameters": Row("lora.target_parameters", "lora_list"),
    "lora_modules_to_save": Row("lora.modules_to_save", "lora_list"),
    "load_in_4bit": Row("lora.quantize", "nf4"),
    "load_in_8bit": Row("lora.quantize", "int8"),
    "wandb_project": Row("train.tracker_project", "tracker_project"),
    "wandb_name": Row("train.run_name", "file_name"),
    "use_wandb": Row("train.trackers", "tracker_flag"),
    "use_tensorboard": Row("train.trackers", "tracker_flag"),
    "use_mlflow": Row("train.trackers", "tracker_flag"),
    "use_comet": Row("train.trackers", "tracker_flag"),
    "use_swanlab": Row("train.trackers", "tracker_flag"),
    "use_trackio": Row("train.trackers", "tracker_flag"),
    "mlflow_experiment_name": Row("train.tracker_project", "tracker_project"),
    "comet_project_name": Row("train.tracker_project", "tracker_project"),
    "swanlab_project": Row("train.tracker_project", "tracker_project"),
    "trackio_project_name": Row("train.tracker_project", "tracker_project"),
    "swanlab_experiment_name": Row("train.run_name", "file_name"),
    "trackio_run_name": Row("train.run_name", "file_name"),
    "mlflow_run_name": Row("train.run_name", "file_name"),
}

NOT_NEEDED = {
    "the launcher chooses it: accelerate launch --config_file accelerate_configs/zero2.yaml": (
        "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type accelerator_config "
        "local_rank ddp ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "dp_shard_size dp_replicate_size device device_map world_size use_ray ray_num_workers "
        "ray_run_name resources_per_worker"
    ),
    "a hung process is found by train.hang_timeout, which adapts to the run's own speed": (
        "ddp_timeout"
    ),
    "the same command resumes a run; --resume refuses to start a new one": (
        "resume_from_checkpoint auto_resume_from_checkpoints"
    ),
    "a checkpoint holds what a resume needs, and its manifest is written last": (
        "save_only_model save_safetensors save_first_step"
    ),
    "the checkpoint says what model and tokenizer it is": (
        "model_type tokenizer_type base_model_config tokenizer_use_fast tokenizer_legacy "
        "is_llama_derived_model is_falcon_derived_model is_mistral_derived_model "
        "low_cpu_mem_usage strict full_finetune max_memory gpu_memory_limit "
        "base_model_ignore_patterns"
    ),
    "rows are packed with masks between examples, which changes no step": (
        "sample_packing eval_sample_packing pad_to_sequence_len sample_packing_group_size "
        "sample_packing_bin_size sample_packing_eff_est sample_packing_seq_len_multiplier "
        "sample_packing_sequentially sample_packing_mp_start_method max_packed_sequence_len "
        "multipack_real_batches batch_flattening total_num_tokens total_supervised_tokens "
        "pretrain_multipack_attn pretrain_multipack_buffer_size pretraining_sample_concatenation "
        "streaming_multipack_buffer_size dpo_padding_free pad_to_multiple_of"
    ),
    "token tables are made once, with all cores, and kept in the run folder": (
        "dataset_prepared_path dataset_processes dataset_num_proc dataset_keep_in_memory "
        "skip_prepare_dataset dataset_shard_num dataset_shard_idx num_dataset_shards_to_save "
        "is_preprocess preprocess_iterable"
    ),
    "batches are prepared in the background": (
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor"
    ),
    "columns that the format does not read are ignored, and the log names them": (
        "remove_unused_columns"
    ),
    "micro-batches are made by tokens (train.tokens_per_micro_batch), also in evaluation": (
        "eval_batch_size auto_find_batch_size eval_sequence_len"
    ),
    "logits are never held whole; fast kernels are chosen by a test against the model": (
        "plugins liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm "
        "liger_glu_activation liger_swiglu liger_fused_linear_cross_entropy liger_cross_entropy "
        "liger_use_token_scaling cut_cross_entropy chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks use_kernels lora_mlp_kernel lora_qkv_kernel "
        "lora_o_kernel lora_embedding_kernel fused_attn_kernel flash_attn_cross_entropy "
        "flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv flash_optimum use_scattermoe "
        "use_sonicmoe experts_implementation use_dsv4_kernels use_glm_dsa_kernels "
        "dsv4_fp4_grouped_mode gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 "
        "sdpa_varlen tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "llama4_linearized_experts dpo_use_liger_kernel dpo_use_logits_to_keep "
        "experimental_skip_move_to_device torchdistx_path"
    ),
    "modern-llm export --push_to_hub uploads a model": "hub_model_id hub_strategy hub_revision",
    "set by the tracker's own environment variables": (
        "wandb_entity wandb_watch wandb_log_model wandb_run_id wandb_mode mlflow_tracking_uri "
        "hf_mlflow_log_artifacts comet_api_key comet_workspace comet_experiment_key comet_mode "
        "comet_online comet_experiment_config swanlab_mode swanlab_workspace swanlab_description "
        "swanlab_log_model swanlab_api_key trackio_space_id"
    ),
    "the metric says whether lower or higher is better": "greater_is_better",
    "reference log-probs are always computed once and kept on disk": "precompute_ref_log_probs",
    "the order of the data is drawn from train.seed": (
        "shuffle_merged_datasets shuffle_before_merging_datasets"
    ),
    "a loss that is not finite stops the run; train.skip_loss_spikes skips spikes": (
        "loss_watchdog_threshold loss_watchdog_patience"
    ),
    "throughput, memory and every metric are logged": (
        "include_tokens_per_second include_tkps eval_table_size eval_max_table_size"
    ),
    "train.profile_steps traces the first steps": "profiler_steps profiler_steps_start",
    "freed memory is returned where it is needed": (
        "gc_steps gc_collect_steps torch_empty_cache_steps"
    ),
    "the fastest exact kernel is chosen; train.attn_implementation names one of separate rows": (
        "attn_implementation flash_attention sdp_attention xformers_attention flex_attention "
        "eager_attention sage_attention flex_attn_compile_kwargs s2_attention scaling_softmax "
        "scaling_softmax_factor scaling_softmax_bias"
    ),
}

NO_EQUIVALENT = {
    "code of a model's repository is never run": "trust_remote_code trainer_cls",
    "download the revision and name its folder": "revision_of_model",
    "a tokenizer is used as it is: change it in its folder first": (
        "special_tokens tokens added_tokens_overrides eot_tokens resize_token_embeddings_to_32x "
        "mean_resizing_embeddings shrink_embeddings fix_untrained_tokens "
        "tokenizer_use_mistral_common tokenizer_save_jinja_files default_system_message "
        "chat_template_kwargs"
    ),
    "the prompt is never trained on": "train_on_inputs",
    "adapters are plain LoRA on a whole model: merge others first (modern-llm export --merge)": (
        "lora_model_dir lora_fan_in_fan_out lora_rank_pattern lora_alpha_pattern peft "
        "peft_layers_pattern peft_layer_replication peft_init_lora_weights "
        "peft_trainable_token_indices peft_ensure_weight_tying peft_autocast_adapter_dtype "
        "loraplus_lr_ratio loraplus_lr_embedding loftq_config lora_on_cpu bnb_config_kwargs "
        "qlora_sharded_model_loading merge_lora merge_method relora relora_steps "
        "relora_prune_ratio relora_prune_method relora_warmup_steps relora_cpu_offload"
    ),
    "weights are trained in float32 and only adapters have a base of few bits": (
        "fp8 fp8_enable_fsdp_float8_all_gather qat quantization gptq gptq_groupsize gptq_model_v1 "
        "gptq_disable_exllama model_quantization_config model_quantization_config_kwargs "
        "use_onebitllms quantize_moe_experts nvfp4_merge_aware llmcompressor float32 fp32_norms "
        "fp32_norm_classes embeddings_skip_upcast"
    ),
    "all weights or adapters are trained, no chosen part of the weights": (
        "unfrozen_parameters freeze_mm_modules lisa_n_layers lisa_step_interval "
        "lisa_layers_attribute reinit_weights"
    ),
    "an optimizer has one learning rate, one of three schedules and no further options": (
        "optim_args optim_target_modules lr_scheduler_kwargs lr_quadratic_warmup lr_div_factor "
        "lr_groups embedding_lr embedding_lr_scale cosine_constant_lr_ratio eta_min adam_beta3 "
        "adam_epsilon2 jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps log_sweep_min_lr log_sweep_max_lr"
    ),
    "a model is split over devices by ZeRO or FSDP alone": (
        "context_parallel_size context_parapllel_size sequence_parallel_degree heads_k_stride "
        "ring_attn_func tensor_parallel_size expert_parallel_size expert_parallel_num_nvl_bytes "
        "expert_parallel_token_capacity deepcompile"
    ),
    "how activations are recomputed is fixed": (
        "gradient_checkpointing_kwargs selective_checkpointing layer_offloading"
    ),
    "the order of the data depends on the seed alone, not on lengths or difficulty": (
        "group_by_length curriculum_sampling dataloader_drop_last"
    ),
    "max_length bounds every example; too short ones are kept": (
        "min_sample_len excess_length_strategy"
    ),
    "equal rows are kept; modern-llm inspect counts them": "dataset_exact_deduplication",
    "data.streaming with train.max_steps reads instructions and pairs in windows": "streaming",
    "data is tokenised once into a table on disk": "push_dataset_to_hub",
    "the model's own configuration is used": (
        "model_config overrides_of_model_config overrides_of_model_kwargs cls_model_config"
    ),
    "only text is read": "processor_type processor_kwargs image_size image_resize_algorithm",
    "the loss takes no such term": "neftune_noise_alpha use_eaft eaft_alpha eaft_k",
    "the metrics of the stage are the only ones": (
        "do_causal_lm_eval eval_causal_lm_metrics eval_max_new_tokens do_bench_eval "
        "bench_dataset bench_split use_otel_metrics otel_metrics_host otel_metrics_port "
        "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer"
    ),
    "the backend and mode of the compiler are not options": (
        "torch_compile_backend torch_compile_mode torch_compile_options"
    ),
    "torch's own setting is used": "tf32",
    "tokens come from the Hub's own login": "hf_use_auth_token",
    "no stage here trains that": (
        "reward_model process_reward_model num_labels center_rewards_coefficient diffusion trl "
        "vllm ebft use_pose pose_split_on_token_ids "
        "pose_max_context_len pose_num_chunks dynamic_checkpoint"
    ),
    "no feature of a run": (
        "test_value debug axolotl_config_path gradio_title gradio_share gradio_server_name "
        "gradio_server_port gradio_max_new_tokens gradio_temperature"
    ),
}

DEFAULTS = {
    "num_epochs": 1.0,
    "micro_batch_size": 1,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "sequence_len": 512,
}
