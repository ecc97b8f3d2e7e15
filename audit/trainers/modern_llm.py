"""This package, by its public functions (`ml.dpo`, `ml.sft`) and its command line."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from trainers.common import Clock

NAME = "audit"


def about(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the version."""
    import torch
    import transformers

    import modern_llm

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"version": modern_llm.__version__, "versions": versions}


def train(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Train, or resume what is in the folder; return losses, weights and checkpoints."""
    import modern_llm as ml

    clock = Clock()

    class Steps(ml.Callback):
        def on_step_end(self, state: Any, control: Any) -> None:
            clock.step()
            step_done(state.step)

    out = Path(request["out"])
    sft = request.get("stage", "dpo") == "sft"
    options = {} if sft else {"beta": request.get("beta", 0.1)}
    if sft:
        # The names of a row's columns here are those of prompt and response.
        options["columns"] = {"prompt": "prompt", "response": "completion"}
    if request.get("save_every"):
        options["save_every"] = request["save_every"]
    if request.get("micro"):
        options["micro_batch_size"] = request["micro"]
    final = (ml.sft if sft else ml.dpo)(
        request["model"],
        request["rows"],
        output_dir=out,
        run_name=NAME,
        batch_size=request["batch"],
        max_steps=request["steps"],
        learning_rate=request.get("rate", 1e-3),
        schedule="constant",
        max_length=request.get("max_length", 256),
        log_every=1,
        seed=request.get("seed", 42),
        callbacks=[Steps()],
        **options,
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "loss" in record]
    return {
        "losses": [record["loss"] for record in logged],
        "norms": [record["grad_norm"] for record in logged],
        "weights": str(Path(final) / "model.safetensors"),
        **clock.figures(),
    }


def command(words: list[str]) -> list[str]:
    """Run a verb of the command line in this process; return the lines that it prints."""
    from modern_llm.cli import main

    with redirect_stdout(io.StringIO()) as printed:
        status = main(words)
    if status:
        raise SystemExit(status)
    return printed.getvalue().splitlines()


def tokens(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the ids that would be trained on, by `inspect --tokens`."""
    out = Path(request["out"])
    words = ["inspect", "--data", request["rows"], "--tokenizer", request["model"]]
    words += ["--max_length", str(request.get("max_length", 256)), "--tokens", str(out)]
    command(words)
    return {"rows": [json.loads(line) for line in out.read_text().splitlines()]}


def log_probs(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the log-prob sums of both responses, by `score`."""
    out = Path(request["out"])
    words = ["score", "--model", request["model"], "--data", request["rows"], "--output", str(out)]
    command([*words, "--max_length", str(request.get("max_length", 256)), "--force"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return {"rows": [[row["policy_chosen"], row["policy_rejected"]] for row in rows]}


def score_reference(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Score what the reference store lacks, by `reference fill`; return how many responses."""
    words = ["reference", "fill", "--sft_checkpoint", request["model"], "--data", request["rows"]]
    words += ["--train.output_dir", request["out"], "--train.run_name", NAME]
    words += ["--train.learning_rate", str(request["rate"])]
    words += ["--dpo.max_length", str(request.get("max_length", 256)), "--json"]
    return {"scored": json.loads(command(words)[-1])["scored"]}


def checkpoints(request: dict[str, Any], step_done: Any) -> dict[str, Any]:
    """Return the checkpoint folders of a run, oldest first."""
    folder = Path(request["out"], "checkpoints")
    return {"folders": sorted(str(path) for path in folder.glob("step-*") if path.is_dir())}
