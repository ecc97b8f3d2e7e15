"""Options of LLaMA-Factory's YAML files."""

from __future__ import annotations

from modern_llm.config.foreign import hugging_face
from modern_llm.config.foreign.rows import CHECKPOINT, FIXED_DROPOUT, LENGTH, TEMPLATE, Row

ROWS = {
    **hugging_face.ROWS,
    "model_name_or_path": Row(CHECKPOINT, "text"),
    "finetuning_type": Row("lora", "adapters"),
    "lora_rank": Row("lora.rank", "lora"),
    "lora_alpha": Row("lora.alpha", "lora"),
    "lora_dropout": Row("lora.dropout", "lora_dropout", FIXED_DROPOUT),
    "lora_target": Row("lora.targets", "lora_targets"),
    "use_rslora": Row("lora.rslora", "lora_flag"),
    "use_dora": Row("lora.dora", "lora_flag"),
    "additional_target": Row("lora.modules_to_save", "lora_list"),
    "quantization_bit": Row("lora.quantize", "bits"),
    "dataset": Row(
        "data.dataset_name",
        "registered",
        "a name of dataset_info.json there; here a file, a folder or a Hub id",
    ),
    "eval_dataset": Row(
        "data.eval_dataset_name",
        "text",
        "a name of dataset_info.json there; here a file, a folder or a Hub id",
    ),
    "mask_history": Row("data.targets", "last_answer"),
    "template": Row("data.template", "chat_frame", TEMPLATE),
    "cutoff_len": Row(
        LENGTH, "same", "an over-long prompt loses its start, then the response its end"
    ),
    "use_muon": Row("train.optimizer", "muon_flag"),
    "early_stopping_steps": Row("train.early_stopping_patience", "positive"),
    "max_samples": Row("data.max_examples", "positive"),
    "val_size": Row("data.eval_fraction", "share"),
    "pref_beta": Row("dpo.beta", "number"),
    "pref_loss": Row("dpo.loss_type", "loss_type"),
    "pref_ftx": Row("dpo.nll_coefficient", "number"),
    "kto_chosen_weight": Row("kto.desirable_weight", "number"),
    "kto_rejected_weight": Row("kto.undesirable_weight", "number"),
    "dpo_label_smoothing": Row("dpo.label_smoothing", "smoothing"),
    "simpo_gamma": Row("dpo.simpo_gamma", "simpo"),
    "ld_alpha": Row("dpo.ld_alpha", "ld_alpha"),
    "ref_model": Row("dpo.reference_checkpoint", "text"),
    "pure_bf16": Row(
        "train.mixed_precision", "bf16", "the weights stay float32, the forward is bfloat16"
    ),
    "disable_gradient_checkpointing": Row("train.gradient_checkpointing", "not_flag"),
    "moe_aux_loss_coef": Row("train.router_loss_coefficient", "number"),
    "use_swanlab": Row("train.trackers", "tracker_flag"),
    "swanlab_project": Row("train.tracker_project", "tracker_project"),
    "swanlab_run_name": Row("train.run_name", "file_name"),
}

NOT_NEEDED = {
    **hugging_face.NOT_NEEDED,
    "the verb says what is done": "stage do_train do_eval do_predict use_mca",
    "token tables are made once, with all cores, and kept in the run folder": (
        "preprocessing_num_workers preprocessing_batch_size overwrite_cache tokenized_path "
        "data_shared_file_system dataset_dir media_dir"
    ),
    "rows are packed with masks between examples, which changes no step": (
        "packing neat_packing block_diag_attn use_packed_sequences"
    ),
    "report.html of the run has the curves": "plot_loss",
    "fast kernels are chosen by a test against the model": (
        "enable_liger_kernel use_v1_kernels use_unsloth use_unsloth_gc use_kv_cache "
        "moe_grouped_gemm bias_activation_fusion apply_rope_fusion"
    ),
    "adapters are new in every run": "create_new_adapter",
    "every metric of the stage is logged": (
        "compute_accuracy include_effective_tokens_per_second print_param_status"
    ),
    "the tokenizer and the model are loaded as they are": (
        "use_fast_tokenizer low_cpu_mem_usage ignore_pad_token_for_loss quantization_device_map "
        "device_map export_hf_on_finish"
    ),
    "set by the tracker's own environment variables": (
        "swanlab_mode swanlab_workspace swanlab_api_key swanlab_logdir swanlab_lark_webhook_url "
        "swanlab_lark_secret trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "answers are made by modern-llm generate": (
        "infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager "
        "vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size "
        "sglang_config sglang_lora_backend predict_with_generate"
    ),
    "modern-llm export writes other forms of a model": (
        "export_dir export_size export_device export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id"
    ),
    "MODERN_LLM_CACHE and HF_HOME name the caches": "cache_dir offload_folder",
    "the fastest exact kernel is chosen; train.attn_implementation names one of separate rows": (
        "flash_attn"
    ),
}

NO_EQUIVALENT = {
    **hugging_face.NO_EQUIVALENT,
    "code of a model's repository is never run": "trust_remote_code",
    "download the revision and name its folder": "model_revision",
    "the Hub's own login is used": "hf_hub_token ms_hub_token om_hub_token",
    "a tokenizer is used as it is: change it in its folder first": (
        "resize_vocab split_special_tokens add_tokens add_special_tokens "
        "new_special_tokens_config init_special_tokens"
    ),
    "adapters are plain LoRA on a whole model: merge others first (modern-llm export --merge)": (
        "adapter_name_or_path adapter_folder pissa_init pissa_iter "
        "pissa_convert loraplus_lr_ratio loraplus_lr_embedding double_quantization "
        "quantization_method quantization_type oft_rank oft_block_size oft_target module_dropout "
        "ref_model_adapters ref_model_quantization_bit"
    ),
    "all weights or adapters are trained, no chosen part of the weights": (
        "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_llama_pro "
        "freeze_vision_tower freeze_multi_modal_projector freeze_language_model"
    ),
    "optimizers are adamw, adamw_8bit, muon and adafactor, without further options": (
        "use_adam_mini use_galore galore_target "
        "galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise "
        "use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam "
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval "
        "badam_update_ratio badam_mask_mode badam_verbose"
    ),
    "sources are mixed by data.sources with a weight each": (
        "mix_strategy interleave_probs eval_on_each_dataset"
    ),
    "data.streaming with train.max_steps reads instructions and pairs in windows": (
        "buffer_size streaming"
    ),
    "the prompt is never trained on": "train_on_prompt",
    "the tokenizer's own template writes system words, tools and thoughts": (
        "default_system tool_format enable_thinking preserve_thinking"
    ),
    "the model's own configuration is used": (
        "rope_scaling shift_attn mixture_of_depths upcast_layernorm upcast_lmhead_output "
        "model_max_length compute_dtype use_reentrant_gc train_from_scratch"
    ),
    "the loss takes no such term": (
        "neftune_noise_alpha label_smoothing_factor pref_bco_weight use_dft_loss use_asft_loss "
        "asft_alpha use_eaft_loss eaft_alpha"
    ),
    "the order of the data depends on the seed alone, not on lengths": (
        "train_sampling_strategy length_column_name group_by_length disable_shuffling"
    ),
    "a model is split over devices by ZeRO or FSDP alone": (
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "context_parallel_size sequence_parallel use_distributed_optimizer overlap_param_gather "
        "overlap_grad_reduce moe_token_dispatcher_type recompute_granularity mixed_precision "
        "use_megatron_bridge megatron_bridge_args use_hyper_parallel hyper_parallel_args "
        "hyper_parallel_cp_size ray_num_workers fsdp_transformer_layer_cls_to_wrap"
    ),
    "weights are trained in float32 and only adapters have a base of few bits": (
        "fp8 fp8_backend fp8_enable_fsdp_float8_all_gather"
    ),
    "experts stay on the device": (
        "use_kt kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path "
        "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size"
    ),
    "only text is read": (
        "image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate"
    ),
    "no stage here trains that": (
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model "
        "reward_model_adapters reward_model_quantization_bit reward_model_type "
        "eval_num_beams"
    ),
}

DEFAULTS = {
    **hugging_face.DEFAULTS,
    "cutoff_len": 2048,
    "disable_gradient_checkpointing": False,
    "lora_rank": 8,
}
