"""ms-swift, by `rlhf_main` and `sft_main` with the options of its command line.

Column names are given with `columns`, the chat template is the tokenizer's own
(`template_backend: jinja`). It has no stored reference, and packing is for FlashAttention.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from serve import NeedsGPU, NotOffered

from trainers.common import Clock
from trainers.common import checkpoints as checkpoints
from trainers.common import log_probs as log_probs
from trainers.common import score_reference as score_reference

PAIRS = {"prompt": "query", "chosen": "response", "rejected": "rejected_response"}
ANSWERS = {"prompt": "query", "completion": "response"}


def about(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the version."""
    from importlib.metadata import version

    listed = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {"version": version("ms-swift"), "versions": listed}


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the command line."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(request.get("micro") or request["batch"], request["batch"] // world)
    sft = request.get("stage", "dpo") == "sft"
    found = {
        "model": request["model"],
        "model_type": "llama",
        "template": "dummy",
        "template_backend": "jinja",
        "torch_dtype": "float32",
        "tuner_type": "full",
        "dataset": [request["rows"]],
        "columns": ANSWERS if sft else PAIRS,
        "split_dataset_ratio": 0.0,
        "output_dir": request["out"],
        "add_version": False,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": request["batch"] // (micro * world),
        "gradient_checkpointing": False,
        "max_steps": request["steps"],
        "learning_rate": request.get("rate", 1e-3),
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_length": request.get("max_length", 256),
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": request.get("save_every") or request["steps"],
        "seed": request.get("seed", 42),
        "dataloader_num_workers": 0,
        "use_hf": True,
    }
    if request.get("from_checkpoint"):
        found["resume_from_checkpoint"] = request["from_checkpoint"]
    return found


def train(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Train, or resume from the last checkpoint in the folder; return losses and weights."""
    if request.get("packing"):
        raise NeedsGPU("packing requires a flash attention implementation, says its error")
    from swift import RLHFArguments, SftArguments, rlhf_main, sft_main
    from transformers import Trainer, TrainerCallback

    clock = Clock()

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.step()
            step_done(state.global_step)

    # Its command line has no way to add a callback.
    begin = Trainer.train
    Trainer.train = lambda self, *words, **more: (
        self.add_callback(Steps()),
        begin(self, *words, **more),
    )[1]
    options = settings(request)
    found = checkpoints(request, step_done)["folders"]
    if found:
        # It is resumed by the name of a checkpoint; the last one is meant.
        options.setdefault("resume_from_checkpoint", found[-1])
    if request.get("stage", "dpo") == "sft":
        sft_main(SftArguments(**options))
    else:
        beta = request.get("beta", 0.1)
        rlhf_main(RLHFArguments(rlhf_type="dpo", beta=beta, **options))
    if os.environ.get("RANK", "0") != "0":
        return {}
    last = Path(checkpoints(request, step_done)["folders"][-1])
    state = json.loads((last / "trainer_state.json").read_text())
    logged = [record for record in state["log_history"] if "loss" in record]
    return {
        "losses": [record["loss"] for record in logged],
        "norms": [record["grad_norm"] for record in logged],
        "weights": str(last / "model.safetensors"),
        **clock.figures(),
    }


def tokens(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """It shows the ids of one row in its log, and writes none."""
    raise NotOffered("it writes the ids of no row but the first")
