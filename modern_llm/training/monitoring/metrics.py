"""Output of a run: the console line, the progress bar's text and `metrics.jsonl`; rank 0 only."""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modern_llm.config.errors import StorageError
from modern_llm.storage.atomic import write_file
from modern_llm.storage.fault_points import around
from modern_llm.storage.untrusted import finite, json_lines, whole_number

log = logging.getLogger(__name__)

# Metrics in the console line after loss, accuracy and lr, with their short names.
ALSO_SHOWN = {
    "rewards/margins": "margin",
    "perplexity": "perplexity",
    "aux_loss": "aux_loss",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens/s",
}


def console_line(step: int, metrics: Mapping[str, float]) -> str:
    """Return e.g. `step=100 loss=0.4523 accuracy=72.50% lr=5.000e-06 margin=0.912`."""
    parts = [f"step={step}"]
    if "loss" in metrics:
        parts.append(f"loss={metrics['loss']:.4f}")
    if "rewards/accuracies" in metrics:
        parts.append(f"accuracy={metrics['rewards/accuracies']:.2%}")
    if "lr" in metrics:
        parts.append(f"lr={metrics['lr']:.3e}")
    if metrics.get("ties"):  # before training all are: accuracy 0% means nothing then
        parts.append(f"ties={metrics['ties']:.2%}")
    parts += [
        f"{short}={metrics[name]:.4g}" for name, short in ALSO_SHOWN.items() if name in metrics
    ]
    return " ".join(parts)


# Metrics beside the progress bar, with their formats.
STATUS = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.1%}",
    "rewards/margins": "margin {:.3f}",
    "perplexity": "perplexity {:.2f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "memory_gb": "{:.1f} GB",
}


def status_line(metrics: Mapping[str, float]) -> str:
    """Return the text beside the progress bar, e.g. `loss 0.4523  accuracy 72.5%`."""
    return "  ".join(form.format(metrics[n]) for n, form in STATUS.items() if n in metrics)


class MetricsLog:
    """The file `metrics.jsonl`: one object per logged step.

    Args:
        check: called before each write; raises if this process may no longer write here.
    """

    def __init__(self, path: Path, check: Callable[[], None] = lambda: None):
        self.path, self._check = path, check

    def truncate(self, step: int) -> None:
        """Remove the records after `step`: those steps are repeated on resume."""
        self._check()
        if self.path.exists():
            kept = (record for record in self.records() if record["step"] <= step)
            write_file(self.path, (json.dumps(record) + "\n" for record in kept))

    def last(self) -> dict[str, Any]:
        """Return the last record, an empty one if nothing was logged."""
        last: dict[str, Any] = {}
        for record in self.records():
            last = record
        return last

    def elapsed(self) -> float:
        """Return the seconds that the run took before it was resumed."""
        return finite(self.last().get("elapsed_s")) or 0.0

    def append(self, record: Mapping[str, float]) -> None:
        """Append one object; `nan` and `inf` become null, because JSON has no numbers for them."""
        self._check()
        known = {k: v if v == v and abs(v) != float("inf") else None for k, v in record.items()}
        with around("metrics.append"), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(known) + "\n")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records in order; damaged lines are skipped with a warning.

        The last line may be incomplete: the writer was killed, or is still writing.
        """
        first, damaged = 0, 0
        try:
            for number, record in json_lines(self.path, follow=False):
                step = whole_number(record.get("step")) if isinstance(record, dict) else None
                if step is None:
                    first, damaged = first or number, damaged + 1
                else:
                    yield record | {"step": step}
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(
                f"{self.path}: cannot be read ({error.strerror or error}): move it away"
            ) from error
        if damaged:
            log.warning("%s:%d: %d damaged lines are skipped", self.path, first, damaged)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far in GB (1e9 bytes): the device's, or the process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
