"""The rules of the tables in `config/foreign` by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modern_llm.verbs.migration import model_rules, train_rules
from modern_llm.verbs.migration.request import Found, Request


def translate(request: Request, name: str, value: Any, rule: str, ours: str) -> Found:
    """Return what an option sets here.

    Raises:
        NoEquivalent, Off: it sets nothing.
    """
    return RULES[rule](request, name, value, ours)


RULES: dict[str, Callable[[Request, str, Any, str], Found]] = {
    "same": train_rules.same,
    "not_pretrain": train_rules.same,
    "text": train_rules.text,
    "file_name": train_rules.file_name,
    "number": train_rules.number,
    "adam": train_rules.adam,
    "positive": train_rules.positive,
    "flag": train_rules.flag,
    "not_flag": train_rules.not_flag,
    "recompute": train_rules.recompute,
    "offloaded": train_rules.offloaded,
    "batch": train_rules.batch,
    "epochs": train_rules.epochs,
    "schedule": train_rules.schedule,
    "schedule_options": train_rules.schedule_options,
    "warmup": train_rules.warmup,
    "ratio": train_rules.ratio,
    "grad_norm": train_rules.grad_norm,
    "bf16": train_rules.bf16,
    "fp16": train_rules.fp16,
    "best_metric": train_rules.best_metric,
    "optimizer": train_rules.optimizer,
    "muon_flag": train_rules.muon_flag,
    "every": train_rules.every,
    "strategy": train_rules.strategy,
    "per_epoch": train_rules.per_epoch,
    "trackers": train_rules.trackers,
    "tracker_flag": train_rules.tracker_flag,
    "tracker_project": train_rules.tracker_project,
    "adapters": model_rules.adapters,
    "lora": model_rules.lora,
    "lora_dropout": model_rules.lora_dropout,
    "lora_targets": model_rules.lora_targets,
    "lora_all_linear": model_rules.lora_all_linear,
    "lora_flag": model_rules.lora_flag,
    "lora_layers": model_rules.lora_layers,
    "lora_list": model_rules.lora_list,
    "nf4": model_rules.nf4,
    "int8": model_rules.int8,
    "bits": model_rules.bits_of,
    "nf4_type": model_rules.nf4_type,
    "eval_split": model_rules.eval_split,
    "share": model_rules.share,
    "all_answers": model_rules.all_answers,
    "last_answer": model_rules.last_answer,
    "template": model_rules.template,
    "chat_frame": model_rules.chat_frame,
    "registered": model_rules.registered,
    "trl_sources": model_rules.training_sources,
    "axolotl_sources": model_rules.training_sources,
    "axolotl_evaluation": model_rules.evaluation_sources,
    "axolotl_rl": model_rules.axolotl_rl,
    "loss_type": model_rules.loss_type,
    "loss_weights": model_rules.loss_weights,
    "f_divergence": model_rules.f_divergence,
    "f_alpha": model_rules.f_alpha,
    "sync_reference": model_rules.sync_reference,
    "sync_option": model_rules.sync_option,
    "smoothing": model_rules.smoothing,
    "ld_alpha": model_rules.ld_alpha,
    "discopop": model_rules.discopop,
    "simpo": model_rules.simpo,
}
