"""Token budget of a forward: `train.tokens_per_micro_batch: auto` halves it when memory runs out.

A step that runs out of memory is repeated from unchanged weights with half the tokens of its
largest forward, down to the longest example. The budget that fits is written to the run folder and
used on resume. The examples of a step stay the same, so results change only by rounding.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from modern_llm.config.errors import UserError
from modern_llm.storage.atomic import write_file
from modern_llm.storage.untrusted import read_json
from modern_llm.training.run.folder import RunFolder

if TYPE_CHECKING:
    from modern_llm.distributed.runtime import Runtime

log = logging.getLogger(__name__)

SEARCH_STEPS = {"cuda": 8}
"""First steps in which several processes may lower the budget. The optimizer's moments are
allocated in the first one, so it must be more than one step."""
MEMORY = {
    "sft_checkpoint": "",
    "pretrain_checkpoint": "",
    "model": "",
    "lora": "",
    "train": "attention batch_size compile gradient_accumulation_steps gradient_checkpointing "
    "micro_batch_size mixed_precision sequence_parallel",
    "data": "max_length max_prompt_length",
    "dpo": "group_by_prompt loss_type max_length max_prompt_length reference reference_checkpoint",
    "kto": "loss_type max_length max_prompt_length reference reference_checkpoint",
}
"""Settings that the memory of a forward depends on, by section; empty: the whole section. A change
of any other setting keeps the stored budget."""
FILE = "token_budget.json"
CURES = (
    "set train.gradient_checkpointing, lower max_length, or shard the model "
    "(accelerate_configs/zero3.yaml)"
)


class Limited(Protocol):
    """Source of micro-batches whose size can be limited."""

    @property
    def most_tokens(self) -> int | None:
        """Maximum tokens of one forward, None if only the number of examples is limited."""

    def limit(self, tokens: int) -> None:
        """Limit later forwards to `tokens`."""

    def largest_forward(self, step: int) -> int:
        """Return the tokens of the largest forward of a step over all ranks."""

    def largest_example(self) -> tuple[int, str]:
        """Return (tokens, origin) of the example that needs the most padded tokens alone."""


class TokenBudget:
    """Token budget shared by the sources of one run.

    Args:
        sources: the training source first.
        auto: whether the budget may be lowered.
    """

    def __init__(self, sources: Sequence[Limited], *, auto: bool):
        self._sources, self.auto = sources, auto
        self.halved = False
        self._steps_left = 0
        self._found_under = ""
        self._may_write: Callable[[], None] = lambda: None

    @property
    def tokens(self) -> int | None:
        """Maximum tokens of one forward, None if only the number of examples is limited."""
        return self._sources[0].most_tokens

    @property
    def searching(self) -> bool:
        """Whether several processes may still lower the budget."""
        return self.auto and self._steps_left > 0

    def begin(self, runtime: Runtime, run: RunFolder) -> None:
        """Load the budget stored by this run on such a device with the same settings; a
        collective."""
        self._may_write = runtime.may_write
        if not self.auto:
            return
        self._found_under = _circumstances(runtime, run)
        self._steps_left = SEARCH_STEPS.get(runtime.device.type, 0)
        found = runtime.on_main(lambda: self._read(run.path / FILE))
        if found is not None:
            self._limit(found)
        if runtime.is_main and self.tokens is not None:
            origin = "found before" if found is not None else "to begin with"
            log.info("tokens_per_micro_batch: auto, %d tokens a forward (%s)", self.tokens, origin)

    def step_done(self, *, is_main: bool) -> None:
        """Count a step that fitted in memory; after `SEARCH_STEPS` the search ends."""
        if self.searching:
            self._steps_left -= 1
            if not self._steps_left and is_main:
                log.info("tokens_per_micro_batch: %s from here on", self.tokens)

    def halve(self, step: int, folder: Path, *, writes: bool) -> int:
        """Set the budget to half the largest forward of `step`, the same on every process.

        Args:
            writes: whether this process writes it to the run folder.

        Returns:
            The new maximum of tokens in a forward.

        Raises:
            UserError: the largest forward is already no more than the longest example.
        """
        source = self._sources[0]
        taken = source.largest_forward(step)
        longest, origin = source.largest_example()
        tokens = max(longest, taken // 2)
        if tokens >= taken:
            raise UserError(
                f"out of memory in step {step + 1}: train.tokens_per_micro_batch auto is down to "
                f"{taken} tokens, and the longest example ({origin}) takes {longest}: {CURES}"
            )
        self._limit(tokens)
        if writes:
            log.warning(
                "warning: out of memory in step %d with %d tokens a forward: %d from here on",
                step + 1,
                taken,
                tokens,
            )
            note = {"tokens_per_micro_batch": tokens, "step": step + 1, "under": self._found_under}
            self._may_write()
            write_file(folder / FILE, json.dumps(note) + "\n")
        return tokens

    def _limit(self, tokens: int) -> None:
        self.halved = True
        for source in self._sources:
            source.limit(tokens)

    def _read(self, file: Path) -> int | None:
        try:
            note = read_json(file, follow=False)
            tokens = int(note["tokens_per_micro_batch"])
            return tokens if tokens > 0 and note["under"] == self._found_under else None
        except FileNotFoundError:
            return None
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            OverflowError,
            RecursionError,
        ) as error:
            log.warning("%s: cannot be read and is left out (%s)", file, type(error).__name__)
            return None


def _circumstances(runtime: Runtime, run: RunFolder) -> str:
    """Digest of the device and of the settings listed in `MEMORY`."""
    device: Any = runtime.device.type
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        device = [properties.name, properties.total_memory]
    settings = {}
    for section, names in MEMORY.items():
        values = run.record.get(section)
        if isinstance(values, dict) and names:
            values = {name: values.get(name) for name in names.split()}
            if values.get("sequence_parallel") in (None, 1):  # absent where earlier versions wrote
                values.pop("sequence_parallel", None)
        settings[section] = values
    facts = json.dumps([device, settings], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()
