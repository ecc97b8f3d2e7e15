"""Run folders made by hand: what a report reads, without a run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a plausible run folder of so many logged steps and return it."""

    def make(name: str = "run", steps: int = 50, beta: float = 0.1, **config) -> Path:
        folder, rng = tmp_path / name, random.Random(name)
        folder.mkdir()
        train = {"run_name": "dpo-hh", "output_dir": str(folder), "learning_rate": 5e-6} | config
        record = {"sft_checkpoint": "models/<sft>", "dpo": {"beta": beta}, "train": train}
        (folder / "config.yaml").write_text(yaml.safe_dump(record))
        with (folder / "metrics.jsonl").open("w") as out:
            for step in range(1, steps + 1):
                t = step / steps
                metrics = {
                    "step": step, "elapsed_s": step * 0.9, "examples": 16 * step,
                    "loss": 0.693 * math.exp(-t) + rng.gauss(0, 0.02),
                    "rewards/accuracies": 0.5 + t / 4, "rewards/margins": beta * t,
                    "rewards/chosen": -beta * t, "rewards/rejected": -2 * beta * t,
                    "logps/chosen": -100 - t, "logps/rejected": -100 - 2 * t, "ties": 0.0,
                    "grad_norm": 2 + rng.random(), "lr": 5e-6 * (1 - t),
                    "tokens_per_second": 9000 + rng.gauss(0, 99), "memory_gb": 31.2,
                }  # fmt: skip
                if step % 10 == 0:
                    metrics |= {"eval/loss": 0.7 - t / 5, "samples/policy_tokens": 50 + 9 * t}
                out.write(json.dumps(metrics) + "\n")
        outcome = {"status": 0, "reason": "done", "last_step": steps}
        (folder / "outcome.json").write_text(json.dumps(outcome))
        source = {
            "source": "hh", "rows": 1000, "kept": 990, "drops": {"equal responses": 10},
            "formats": {"hh": 990}, "prompts_cut": 3, "responses_cut": 2, "tokens": 123_456,
            "notes": [], "mean_tokens": {"prompt": 93.5, "chosen": 36.1},
        }  # fmt: skip
        summary = {"data": [source], "environment": {"torch": "2.13.0", "processes": 8},
                   "changed": ["dpo.beta", "train.learning_rate"]}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary))
        warnings = [
            {"step": 0, "text": "the rate is high", "advice": "try 5e-6"},
            {"step": 20, "text": "the gradient norm is 0", "advice": ""},
        ]
        lines = "".join(json.dumps(warning) + "\n" for warning in warnings)
        (folder / "warnings.jsonl").write_text(lines)
        sample = {"step": steps, "prompt": "Is <b>this</b> safe?", "policy": "</script>yes"}
        (folder / "samples.jsonl").write_text(json.dumps(sample | {"reference": "no"}) + "\n")
        return folder

    return make
