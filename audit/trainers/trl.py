"""TRL, by its trainers (`DPOTrainer`, `SFTTrainer`) and their documented options.

Rows are loaded as TRL's documentation shows it, `load_dataset("json")`. Gradient checkpointing is
off and updates are float32, as on the other side; all else is TRL's default unless a check says so.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trainers.common import Clock
from trainers.common import checkpoints as checkpoints


def about(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the version."""
    import torch
    import transformers
    import trl

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"version": trl.__version__, "versions": versions}


def settings(request: dict[str, Any]) -> dict[str, Any]:
    """Return what both configurations share."""
    import torch

    micro = request.get("micro") or request["batch"]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    micro = min(micro, request["batch"] // world)
    found = {
        "output_dir": request["out"],
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": request["batch"] // (micro * world),
        "max_steps": request["steps"],
        "learning_rate": request.get("rate", 1e-3),
        "lr_scheduler_type": "constant",
        "max_length": request.get("max_length", 256),
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": request.get("seed", 42),
        "dataloader_pin_memory": False,
    }
    if request.get("save_every"):
        found |= {"save_strategy": "steps", "save_steps": request["save_every"]}
    return found


def dataset(path: str) -> Any:
    """Return the rows of a .jsonl file."""
    from datasets import load_dataset

    return load_dataset("json", data_files=path, split="train")


def build(request: dict[str, Any], callbacks: list[Any] = ()) -> Any:
    """Return a trainer of the stage."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = settings(request)
    if request.get("stage", "dpo") == "sft":
        options["packing"] = bool(request.get("packing"))
        config, kind = SFTConfig(**options), SFTTrainer
    else:
        options["beta"] = request.get("beta", 0.1)
        options["precompute_ref_log_probs"] = True
        config, kind = DPOConfig(**options), counting(DPOTrainer)
    return kind(
        model=AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32),
        args=config,
        train_dataset=dataset(request["rows"]),
        processing_class=AutoTokenizer.from_pretrained(request["model"]),
        callbacks=list(callbacks),
    )


def counting(kind: type) -> type:
    """Return a trainer that counts the responses which its reference pass scores."""

    class Counting(kind):
        scored = 0

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            self.scored += len(inputs["input_ids"])
            return super().compute_ref_log_probs(model, inputs)

    return Counting


def train(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Train, or resume what is in the folder; return losses, weights and checkpoints."""
    from transformers import TrainerCallback

    clock = Clock()

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            clock.step()
            step_done(state.global_step)

    out = Path(request["out"])
    trainer = build(request, [Steps()])
    found = sorted(out.glob("checkpoint-*"))
    # As the documentation of `Trainer` says: True takes the last checkpoint in the folder.
    resume = request.get("from_checkpoint") or (True if found else None)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out / "final"))
    logged = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "losses": [record["loss"] for record in logged],
        "norms": [record["grad_norm"] for record in logged],
        "weights": str(out / "final" / "model.safetensors"),
        **clock.figures(),
    }


def one_step(request: dict[str, Any]) -> Any:
    """Return a trainer that was built and not trained."""
    return build(request | {"out": f"{request['out']}.run", "batch": 4, "steps": 1})


def tokens(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the ids that would be trained on, from the batches of the trainer's own collator."""
    trainer = one_step(request)
    rows = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        prompt, sides = [], []
        for ids, taken, seen in zip(
            batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
        ):
            real = seen.bool()
            sides.append(ids[real & taken.bool()].tolist())
            prompt.append(ids[real & ~taken.bool()].tolist())
        rows.append(
            {
                "prompt_ids": prompt[0],
                "chosen_ids": sides[0],
                "rejected_ids": sides[1],
                "prompt_of_rejected_ids": prompt[1],
            }
        )
    return {"rows": rows}


def log_probs(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the log-prob sums of both responses that the precomputation stored."""
    table = one_step(request).train_dataset
    both = zip(table["ref_chosen_logps"], table["ref_rejected_logps"], strict=True)
    return {"rows": [[float(chosen), float(rejected)] for chosen, rejected in both]}


def score_reference(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Build the trainer, which scores the reference; return how many responses it scored."""
    return {"scored": build(request | {"batch": 4, "steps": 1}).scored}
