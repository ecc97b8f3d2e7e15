"""Options of TRL: `DPOConfig`, `KTOConfig`, `SFTConfig`, `ModelConfig`, data of its scripts."""

from __future__ import annotations

from modern_llm.config.foreign import hugging_face
from modern_llm.config.foreign.rows import CHECKPOINT, FIXED_DROPOUT, LENGTH, Row

ROWS = {
    **hugging_face.ROWS,
    # ModelConfig
    "model_name_or_path": Row(CHECKPOINT, "text"),
    "use_peft": Row("lora", "adapters"),
    "lora_r": Row("lora.rank", "lora"),
    "lora_alpha": Row("lora.alpha", "lora"),
    "lora_dropout": Row("lora.dropout", "lora_dropout", FIXED_DROPOUT),
    "lora_target_modules": Row("lora.targets", "lora_targets"),
    "lora_modules_to_save": Row("lora.modules_to_save", "lora_list"),
    "use_rslora": Row("lora.rslora", "lora_flag"),
    "use_dora": Row("lora.dora", "lora_flag"),
    "lora_target_parameters": Row("lora.target_parameters", "lora_list"),
    "load_in_4bit": Row("lora.quantize", "nf4"),
    "load_in_8bit": Row("lora.quantize", "int8"),
    "bnb_4bit_quant_type": Row("lora.quantize", "nf4_type"),
    # Data of the scripts
    "dataset_name": Row("data.dataset_name", "text"),
    "assistant_only_loss": Row("data.targets", "all_answers"),
    "dataset_config": Row("data.subset", "text"),
    "dataset_train_split": Row("data.split", "text"),
    "dataset_test_split": Row("data.eval_split", "eval_split"),
    "datasets": Row("data.sources", "trl_sources"),
    "test_split_size": Row("data.eval_fraction", "share"),
    "activation_offloading": Row("train.gradient_checkpointing", "offloaded"),
    # DPOConfig
    "beta": Row("dpo.beta", "number"),
    "loss_type": Row("dpo.loss_type", "loss_type"),
    "loss_weights": Row("dpo.loss_weights", "loss_weights"),
    "f_divergence_type": Row("dpo.f_divergence", "f_divergence"),
    "f_alpha_divergence_coef": Row("dpo.f_alpha", "f_alpha"),
    "use_weighting": Row("dpo.use_weighting", "flag"),
    "sync_ref_model": Row("dpo.reference_sync_every", "sync_reference"),
    "ref_model_sync_steps": Row("dpo.reference_sync_every", "sync_option"),
    "ref_model_mixup_alpha": Row("dpo.reference_mixup", "sync_option"),
    "label_smoothing": Row("dpo.label_smoothing", "smoothing"),
    "ld_alpha": Row("dpo.ld_alpha", "ld_alpha"),
    "discopop_tau": Row("dpo.discopop_tau", "discopop"),
    "simpo_gamma": Row("dpo.simpo_gamma", "simpo"),
    "rpo_alpha": Row("dpo.nll_coefficient", "number"),
    # KTOConfig
    "desirable_weight": Row("kto.desirable_weight", "number"),
    "undesirable_weight": Row("kto.undesirable_weight", "number"),
    # Of all
    "max_length": Row(
        LENGTH, "same", "an over-long prompt loses its start, then the response its end"
    ),
    "max_prompt_length": Row(
        "dpo.max_prompt_length|data.max_prompt_length|model.max_seq_len",
        "not_pretrain",
        "the prompt's tokens that are kept at least, not at most",
    ),
    "router_aux_loss_coef": Row("train.router_loss_coefficient", "number"),
}

NOT_NEEDED = {
    **hugging_face.NOT_NEEDED,
    "reference log-probs are always computed once and kept on disk": (
        "precompute_ref_log_probs precompute_ref_batch_size use_logits_to_keep force_use_ref_model"
    ),
    "DPO trains without dropout": "disable_dropout",
    "rows are packed with masks between examples, which changes no step": (
        "padding_free packing packing_strategy eval_packing pad_to_multiple_of pad_token"
    ),
    "tokenising uses all cores": "dataset_num_proc",
    "the order of the data is drawn from train.seed": "shuffle_dataset",
    "the prompt is never trained on": "completion_only_loss",
    "the checkpoint says it": "lora_task_type",
    "weights are trained in float32; train.mixed_precision is the forward's dtype": (
        "dtype torch_dtype bnb_4bit_quant_storage"
    ),
    "the fastest exact kernel is chosen; train.attn_implementation names one of separate rows": (
        "attn_implementation"
    ),
}

NO_EQUIVALENT = {
    **hugging_face.NO_EQUIVALENT,
    "code of a model's repository is never run": "trust_remote_code",
    "download the revision and name its folder": "model_revision",
    "the model is loaded with fixed options": "model_init_kwargs ref_model_init_kwargs",
    "SFT reads prompts with answers; plain text is data of the verb pretrain": (
        "dataset_text_field"
    ),
    "the tokenizer's template and end token are used; data.template takes a template's text": (
        "chat_template_path eos_token dataset_kwargs"
    ),
    "dpo.loss_type simpo and orpo are the losses without a reference": "reference_free",
    "an over-long prompt loses its start, then the response its end": (
        "truncation_mode max_completion_length"
    ),
    "one set of adapters on a whole model": (
        "use_bnb_nested_quant model_adapter_name ref_adapter_name"
    ),
    "data.streaming with train.max_steps reads instructions and pairs in windows": (
        "dataset_streaming streaming"
    ),
    "models are not patched": "ignore_bias_buffers",
    "set environment variables in the shell": "env",
}

DEFAULTS = {
    **hugging_face.DEFAULTS,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": True,
    "max_length": 1024,
    "ref_model_sync_steps": 512,
}

STAGE_DEFAULTS = {
    "dpo": {"learning_rate": 1e-6},
    "kto": {"learning_rate": 1e-6},
    "sft": {"learning_rate": 2e-5},
}
