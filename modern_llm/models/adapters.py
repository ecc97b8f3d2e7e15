"""LoRA adapters inside an existing model, in the format of `peft`: add, switch off, save, merge.

The model keeps its class and its forward, so that callers treat it like any other. `peft` is
imported on first use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modern_llm.config.errors import ConfigError, UserError
from modern_llm.config.lora import LoraConfig
from modern_llm.config.printable import first_line
from modern_llm.models.run_checkpoint import is_run_checkpoint, load_weights
from modern_llm.models.unread import copy_reader
from modern_llm.storage.atomic import verified_manifest
from modern_llm.storage.untrusted import read_json

NAME = "default"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Prefix that peft adds to the names of a wrapped model.
PREFIX = "base_model.model."


def add_adapters(model: PreTrainedModel, config: LoraConfig, place: str, *, seed: int) -> None:
    """Freeze `model` and add adapters, which have no effect before training.

    Args:
        place: checkpoint of the weights, written to the adapters' configuration.
        seed: seed of the adapters' initial weights, the same on every rank.
    """
    peft = _peft()
    _refuse_unknown(model, config)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(model, config),
        modules_to_save=config.modules_to_save or None,
        use_dora=config.dora,
        use_rslora=config.rslora,
        init_lora_weights=True if config.initial == "default" else config.initial,
        layers_to_transform=config.layers,
        target_parameters=config.target_parameters or None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=place,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.requires_grad_(False)
        model.add_adapter(settings, NAME)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        original = name.replace(f".modules_to_save.{NAME}.", ".original_module.")
        if original != name:
            copy_reader(parameters[original], parameter)
    model.peft_config[NAME].base_model_name_or_path = place


def _targets(model: PreTrainedModel, config: LoraConfig) -> str | list[str]:
    """Return the layers' names as peft takes them: it chooses layers only among listed ones."""
    if config.targets != "all-linear" or config.layers is None:
        return config.targets
    head = model.get_output_embeddings()
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head)
    return sorted({name.rpartition(".")[2] for name in linear})


def has_adapters(model: nn.Module) -> bool:
    """Return whether `model` has adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


@contextmanager
def adapters_off(model: PreTrainedModel) -> Iterator[None]:
    """Switch adapters off inside the `with` block, which leaves the frozen base."""
    _switch(model, enabled=False)
    try:
        yield
    finally:
        _switch(model, enabled=True)


def _switch(model: PreTrainedModel, *, enabled: bool) -> None:
    """Switch all adapters, and whole modules that train, on or off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    # The model's own `enable_adapters` leaves modules that train whole switched off and frozen.
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            module.enable_adapters(enabled=enabled)


def write_adapters(model: PreTrainedModel, state: dict[str, Tensor], place: Path) -> None:
    """Write the adapters in the format of `peft`.

    Args:
        state: the trained parameters by name, whole and on the CPU.
    """
    peft = _peft()
    kept = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=NAME, save_embedding_layers=False
    )
    tensors = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in kept.items()}
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    write_adapter_config(model, place)


def write_adapter_config(model: PreTrainedModel, place: Path) -> None:
    """Write what kind of adapters `model` has, and the base that they belong to."""
    settings = model.peft_config[NAME]
    before = settings.inference_mode
    settings.inference_mode = True
    settings.save_pretrained(place)
    settings.inference_mode = before


def base_of(folder: Path) -> str | None:
    """Return the base checkpoint of the adapters in `folder`; None if there are none."""
    try:
        content = read_json(folder / CONFIG)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CONFIG}: cannot be read ({error}); fetch it again") from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not base:
        raise UserError(f"{folder / CONFIG}: names no base model; set base_model_name_or_path")
    return str(base)


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Return `base` with the adapters in `folder` merged into its weights."""
    peft = _peft()
    try:
        if is_run_checkpoint(folder):
            verified_manifest(folder)
            settings = peft.PeftConfig.from_pretrained(folder)
            settings.inference_mode = False  # the adapters are those parameters that train
            model = peft.get_peft_model(base, settings)
            load_weights(folder, model, prefix=PREFIX)
        else:
            model = peft.PeftModel.from_pretrained(base, folder, is_trainable=False)
        return model.merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"adapters {folder}: do not fit {base.name_or_path} ({first_line(error)})"
        ) from error


def _refuse_unknown(model: PreTrainedModel, config: LoraConfig) -> None:
    """Refuse names that match no module; peft would skip some of them with a warning."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    asked = [("modules_to_save", config.modules_to_save)]
    if config.targets != "all-linear":
        asked.append(("targets", config.targets))
    problems = [
        f"lora.{option}: no module of this model is called {name!r}; it has "
        f"{', '.join(sorted(e for e in ends if e and not e.isdigit()))}"
        for option, names in asked
        for name in names
        if name.rpartition(".")[2] not in ends
    ]
    parameters = [name for name, _ in model.named_parameters()]
    problems += [
        f"lora.target_parameters: no parameter of this model ends with {name!r}"
        for name in config.target_parameters
        if not any(f".{known}".endswith(f".{name}") for known in parameters)
    ]
    layers = model.config.get_text_config().num_hidden_layers
    problems += [
        f"lora.layers: {number} is no layer of this model: 0 to {layers - 1}"
        for number in config.layers or ()
        if number >= layers
    ]
    if problems:
        raise ConfigError(problems)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            ["LoRA is configured and peft is not installed: pip install modern-llm[lora]"]
        ) from error
    return peft
