"""`modern-llm export`: convert a checkpoint, write its model card, and upload it on request.

The output is a `.pt` file or a `transformers` folder in any dtype; an adapter can be merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modern_llm.config import ModernLLMConfig, MoEConfig
from modern_llm.config.errors import ConfigError, StorageError, UserError
from modern_llm.models import pt_checkpoint
from modern_llm.models.build import to_transformers_config
from modern_llm.models.load import inspect_checkpoint, load_model, load_tokenizer
from modern_llm.report.card import model_card
from modern_llm.storage.atomic import committed_folder, new_file
from modern_llm.storage.fault_points import around

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CARD = "README.md"


def export_checkpoint(
    model: str,
    output: Path,
    *,
    dtype: str = "float32",
    tokenizer_name: str | None = None,
    merge: bool = False,
) -> dict[str, Any]:
    """Write `model` to `output`: a `.pt` file if it ends so, else a `transformers` folder.

    Args:
        model: Hub id, `transformers` folder, `.pt` file, a run's checkpoint, or folder of a `peft`
            adapter.
        tokenizer_name: tokenizer for a checkpoint without one; by default the folder has none then.
        merge: merge the adapter into its base; required for an adapter, an error otherwise.

    Returns:
        `output`, `dtype`, `parameters` and `merged`.

    Raises:
        UserError: the checkpoint cannot be read, or a `.pt` file cannot represent it.
        StorageError: the output cannot be written.
    """
    if output.exists():
        raise ConfigError([f"output {output}: exists already; name another path"])
    checkpoint = inspect_checkpoint(model)
    if (checkpoint.base is not None) != merge:
        which = "not an adapter: remove merge" if merge else "an adapter: set merge to merge it"
        raise ConfigError([f"merge: {model} is {which}"])
    loaded = load_model(checkpoint).to(DTYPES[dtype])
    if output.suffix == ".pt":
        config = modern_config(loaded, model)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            with new_file(output) as temporary, around("export.write"):
                pt_checkpoint.save_model(temporary, config, loaded)
        except (OSError, RuntimeError) as error:
            raise StorageError(f"cannot write {output}: {error}; free space") from error
    else:
        _write_folder(checkpoint.place, loaded, output, tokenizer_name)
    return {
        "output": str(output),
        "dtype": dtype,
        "parameters": loaded.num_parameters(),
        "merged": merge,
    }


def _write_folder(
    model: str, loaded: PreTrainedModel, output: Path, tokenizer_name: str | None
) -> None:
    source = Path(model)
    has_tokenizer = source.is_dir() and any(source.glob("tokenizer*"))
    tokenizer = tokenizer_name or (model if has_tokenizer or not source.exists() else None)
    with committed_folder(output) as folder:
        with around("export.write"):
            loaded.save_pretrained(folder)
            if tokenizer is not None:
                load_tokenizer(tokenizer).save_pretrained(folder)
            if (run := run_of(source)) is not None:
                (folder / CARD).write_text(model_card(run), encoding="utf-8")


def run_of(folder: Path) -> Path | None:
    """Return the run folder that contains a final model, None if the parent is not a run folder."""
    parent = folder.resolve().parent
    # `config.yaml` alone may be the configuration of something else.
    own = (parent / "config.yaml", parent / "metrics.jsonl")
    return parent if all(p.is_file() and not p.is_symlink() for p in own) else None


def modern_config(model: PreTrainedModel, place: str) -> ModernLLMConfig:
    """Return the `ModernLLMConfig` that builds the same architecture as `model`.

    Args:
        place: where the model was loaded from, for messages.

    Raises:
        UserError: `ModernLLMConfig` cannot represent the model; the message names the settings.
    """
    config = model.config
    if config.model_type not in ("llama", "mixtral"):
        raise UserError(
            f"checkpoint {place}: a .pt file can hold Llama and Mixtral, not {config.model_type}: "
            "name a folder as output"
        )
    rope = dict(getattr(config, "rope_parameters", None) or {})
    theta = rope.pop("rope_theta", 10_000.0)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": heads,
        "ffn_hidden_size": config.intermediate_size,
        "max_seq_len": config.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        "rmsnorm_eps": config.rms_norm_eps,
        "dropout": config.attention_dropout or 0.0,
        "initializer_range": config.initializer_range,
        "tie_embeddings": config.tie_word_embeddings,
        "use_gqa": groups != heads,
        "gqa_groups": groups if groups != heads else None,
    }
    if config.model_type == "mixtral":
        fields |= {
            "use_moe": True,
            "moe_config": MoEConfig(
                num_experts=config.num_local_experts,
                top_k=config.num_experts_per_tok,
                aux_loss_coefficient=config.router_aux_loss_coef,
                router_jitter=config.router_jitter_noise,
            ),
        }
    found = ModernLLMConfig(**fields)
    _check_same_shape(to_transformers_config(found), config, place)
    return found


# Settings that do not change the architecture: ids, dtype, code version.
_FREE = {
    "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version",
    "architectures", "use_cache", "_name_or_path", "rope_parameters", "sliding_window",
    "output_router_logits", "pretraining_tp",
}  # fmt: skip


def _check_same_shape(made: Any, own: Any, place: str) -> None:
    """Refuse a model with a setting that `ModernLLMConfig` has no field for."""
    first, second = made.to_dict(), own.to_dict()
    different = [
        f"{name} {second[name]!r}"
        for name in sorted(set(first) & set(second) - _FREE)
        if first[name] != second[name]
    ]
    if different:
        raise UserError(
            f"checkpoint {place}: a .pt file cannot represent {', '.join(different[:4])}: "
            "name a folder as output"
        )


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder to a repository of the Hub and return its URL.

    Raises:
        UserError: the upload failed, for example without a login.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload by modern-llm export",
            ignore_patterns=["MANIFEST.json"],
        )
    except Exception as error:  # the client's exception classes differ between versions
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"push_to_hub {repository}: {type(error).__name__}: {first}; log in with `hf auth "
            f"login` and check the name; the export itself is complete, in {folder}"
        ) from error
    return str(url)
