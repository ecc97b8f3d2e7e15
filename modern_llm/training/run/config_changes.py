"""Which settings may differ between a run and its continuation, and what a difference costs.

Every field of every section has one class. A run folder that holds a run is gone on with under
other settings only as its class allows; the difference is printed either way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from modern_llm.config.base import SECTIONS

FREE = "free"
"""Changes nothing that is learnt, but by rounding."""
ACCEPTED = "allowed with --accept-change"
"""Changes how the rest of the run goes."""
CONTENT = "allowed with --accept-change while what it names has the same content"
"""Names or judges data, weights or a tokenizer; their digests stand in every checkpoint."""
FORBIDDEN = "forbidden"
"""The position, the moments or what was learnt would mean something else."""

_TABLE = {
    FREE: {
        "train": "accept_change attention background_saving compile eval_every generate_every "
        "generate_prompts generate_tokens gradient_accumulation_steps gradient_checkpointing "
        "hang_timeout keep_checkpoints log_every micro_batch_size on_nonfinite output_dir "
        "profile_steps resume save_every tokens_per_micro_batch tracker_project trackers",
        "data": "streaming",
        "dpo": "flush_every keep_token_logprobs reference reference_digest reference_store "
        "self_check_pairs",
    },
    ACCEPTED: {
        "train": "adam_beta1 adam_beta2 adam_epsilon epochs learning_rate max_grad_norm max_steps "
        "min_learning_rate_ratio mixed_precision router_loss_coefficient schedule "
        "skip_loss_spikes warmup_steps weight_decay",
        "data": "eval_dataset_name eval_split",
        "lora": "dropout",
        "model": "dropout",
        "model.moe_config": "aux_loss_coefficient router_jitter",
    },
    CONTENT: {
        "": "pretrain_checkpoint sft_checkpoint tokenizer_name",
        "train": "dataset_name tokenizer_name",
        "data": "dataset_name max_dropped max_examples on_bad_row sources",
        "dpo": "reference_checkpoint",
    },
    FORBIDDEN: {
        "train": "batch_size run_name seed",
        "data": "append_end_token eval_fraction format max_length max_prompt_length split subset "
        "template template_date text_column",
        "dpo": "beta discopop_tau dpop_lambda group_by_prompt label_smoothing ld_alpha loss_type "
        "max_length max_prompt_length nll_coefficient simpo_gamma",
        "lora": "alpha modules_to_save quantize rank targets",
        "model": "d_model ffn_hidden_size gqa_groups initializer_range max_seq_len moe_config "
        "n_heads n_layers rmsnorm_eps rope_scaling rope_theta tie_embeddings use_attention_sinks "
        "use_gqa use_moe use_rope use_swiglu vocab_size",
        "model.moe_config": "capacity_factor num_experts top_k",
    },
}


@dataclass(frozen=True)
class Change:
    """One setting that differs."""

    name: str
    """Dotted, e.g. `train.learning_rate`."""
    old: Any
    new: Any
    kind: str
    """One of the four classes."""

    def __str__(self) -> str:
        return f"{self.name}: {self.old!r} -> {self.new!r} ({self.kind})"


def class_of(name: str) -> str:
    """Return the class of a dotted setting; one that nobody has classed is forbidden."""
    section, _, field = name.rpartition(".")
    found = [
        kind for kind, sections in _TABLE.items() if field in sections.get(section, "").split()
    ]
    return found[0] if found else FORBIDDEN


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    """Yield every setting that differs between two configurations in plain values.

    Sections are compared field by field; one that is there on one side alone differs as a whole. An
    option that `before` lacks had its default: a version without the option wrote it.
    """
    defaults = _defaults(now)
    for key in sorted(set(before) | set(now)):
        name = f"{prefix}{key}"
        old, new = before.get(key, defaults.get(key)), now.get(key)
        if name == "data.sources" and new and isinstance(old, list):
            filled = _defaults(new[0])
            old = [filled | item if isinstance(item, dict) else item for item in old]
        if isinstance(old, dict) and isinstance(new, dict) and name in _SECTIONS:
            yield from changes(old, new, f"{name}.")
        elif old != new:
            yield Change(name, old, new, class_of(name))


def _defaults(section: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the options of a section, which its names tell; else nothing."""
    for kind in SECTIONS:
        known = kind.__pydantic_fields__
        if set(known) == set(section):
            return {
                name: field.get_default(call_default_factory=True)
                for name, field in known.items()
                if not field.is_required()
            }
    return {}


_SECTIONS = frozenset(section for sections in _TABLE.values() for section in sections)
