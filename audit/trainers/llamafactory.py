"""LLaMA-Factory, by `run_exp` with the options of its YAML files.

Rows are named in a `dataset_info.json`, as its documentation says; the chat template is the
tokenizer's own, which it takes where `template` is not set. It has no stored reference. The
environment has a torch for CPUs and no torchaudio of the same kind: see `without_audio`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trainers.common import Clock
from trainers.common import checkpoints as checkpoints
from trainers.common import log_probs as log_probs
from trainers.common import score_reference as score_reference

NO_AUDIO = "torchaudio"
RANKING = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
ANSWERS = {"prompt": "prompt", "response": "completion"}
MESSAGES = {"messages": "prompt", "chosen": "chosen", "rejected": "rejected"}
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
TAGS |= {"assistant_tag": "assistant", "system_tag": "system"}


def without_audio() -> None:
    """Put an empty module in the place of torchaudio where its build does not load.

    It is imported with the data code and used for audio alone, which no check has.
    """
    try:
        importlib.import_module(NO_AUDIO)
    except (ImportError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == NO_AUDIO]:
            del sys.modules[name]
        empty = ModuleType(NO_AUDIO)
        empty.__spec__ = importlib.machinery.ModuleSpec(NO_AUDIO, None)
        sys.modules[NO_AUDIO] = empty


def about(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the version."""
    from importlib.metadata import version

    listed = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"version": version("llamafactory"), "versions": listed}


def describe(request: dict[str, Any], folder: Path) -> None:
    """Write the `dataset_info.json` of the rows."""
    rows = Path(request["rows"])
    entry: dict[str, Any] = {"file_name": str(rows)}
    if request.get("stage", "dpo") == "sft":
        entry["columns"] = ANSWERS
    elif '"role"' in rows.read_text("utf-8").partition("\n")[0]:
        # A response is one message there, in a row of its own form.
        own = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
        own = [row | {"chosen": row["chosen"][0], "rejected": row["rejected"][0]} for row in own]
        entry["file_name"] = str(folder / "messages.jsonl")
        Path(entry["file_name"]).write_text("".join(json.dumps(row) + "\n" for row in own))
        entry |= {"formatting": "sharegpt", "ranking": True, "columns": MESSAGES, "tags": TAGS}
    else:
        entry |= {"ranking": True, "columns": RANKING}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}))


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a YAML file."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(request.get("micro") or request["batch"], request["batch"] // world)
    listed = Path(f"{request['out']}.data")
    listed.mkdir(parents=True, exist_ok=True)
    describe(request, listed)
    sft = request.get("stage", "dpo") == "sft"
    found = {
        "stage": "sft" if sft else "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": request["model"],
        "dataset_dir": str(listed),
        "dataset": "rows",
        "output_dir": request["out"],
        "use_cpu": not torch.cuda.is_available(),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": request["batch"] // (micro * world),
        "disable_gradient_checkpointing": True,
        "max_steps": request["steps"],
        "learning_rate": request.get("rate", 1e-3),
        "lr_scheduler_type": "constant",
        "cutoff_len": request.get("max_length", 256),
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps" if request.get("save_every") else "no",
        "seed": request.get("seed", 42),
    }
    if request.get("save_every"):
        found["save_steps"] = request["save_every"]
    if request.get("packing"):
        found |= {"packing": True, "neat_packing": True}
    if request.get("from_checkpoint"):
        found["resume_from_checkpoint"] = request["from_checkpoint"]
    return found


def train(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Train, or resume what is in the folder; return losses, weights and checkpoints."""
    without_audio()
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    clock = Clock()

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.step()
            step_done(state.global_step)

    out = Path(request["out"])
    run_exp(settings(request), callbacks=[Steps()])
    if os.environ.get("RANK", "0") != "0":
        return {}
    state = json.loads((out / "trainer_state.json").read_text())
    logged = [record for record in state["log_history"] if "loss" in record]
    return {
        "losses": [record["loss"] for record in logged],
        "norms": [record["grad_norm"] for record in logged],
        "weights": str(out / "model.safetensors"),
        **clock.figures(),
    }


def tokens(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the ids that would be trained on, from its own preparation of the rows."""
    without_audio()
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    asked = settings(request | {"batch": 4, "steps": 1})
    model, data, training, _, _ = get_train_args(asked)
    module = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data)
    table = get_dataset(template, model, data, training, stage="rm", **module)["train_dataset"]
    rows = []
    for row in table:
        sides = {}
        for side in ("chosen", "rejected"):
            labels = row[f"{side}_labels"]
            start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
            sides[side] = row[f"{side}_input_ids"][:start], row[f"{side}_input_ids"][start:]
        rows.append(
            {
                "prompt_ids": sides["chosen"][0],
                "chosen_ids": sides["chosen"][1],
                "rejected_ids": sides["rejected"][1],
                "prompt_of_rejected_ids": sides["rejected"][0],
            }
        )
    return {"rows": rows}
