"""How many tokens a forward takes where nobody says: what the device begins with, halved when
memory runs out, then kept.

The rule of `train.tokens_per_micro_batch: auto`: a step in which a forward or backward finds no
memory is made again from unchanged weights, with half of what its largest forward took, and so on
down to the longest example; what fits is written into the run folder and taken over by whoever goes
on with the run. The examples of a step stay the same, so no number changes but by rounding. Called
by the loop.
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
"""Steps in which several processes look for what fits. The moments exist from the second on."""
MEMORY = {
    "sft_checkpoint": "",
    "pretrain_checkpoint": "",
    "model": "",
    "lora": "",
    "train": "attention batch_size compile gradient_accumulation_steps gradient_checkpointing "
    "micro_batch_size mixed_precision",
    "data": "max_length max_prompt_length",
    "dpo": "group_by_prompt loss_type max_length max_prompt_length reference reference_checkpoint",
}
"""The settings that the memory of a forward depends on, by section; all of one where none is
named. A change of another setting keeps what was found."""
FILE = "token_budget.json"
CURES = (
    "set train.gradient_checkpointing, lower max_length, or shard the model "
    "(accelerate_configs/zero3.yaml)"
)


class Limited(Protocol):
    """Micro-batches whose size can be changed."""

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of one forward, None where only examples bound it."""

    def limit(self, tokens: int) -> None:
        """Let forwards take at most so many tokens from here on."""

    def largest_forward(self, step: int) -> int:
        """Return the tokens of the largest forward of a step over all ranks."""

    def largest_example(self) -> tuple[int, str]:
        """Return (tokens, origin) of the example that takes most room alone in a forward."""


class TokenBudget:
    """The token budget that the sources of one run share.

    Args:
        sources: the first is the one that is trained on.
        auto: whether it may change.
    """

    def __init__(self, sources: Sequence[Limited], *, auto: bool):
        self._sources, self.auto = sources, auto
        self.halved = False
        self._steps_left = 0
        self._found_under = ""
        self._may_write: Callable[[], None] = lambda: None

    @property
    def tokens(self) -> int | None:
        """Most tokens of one forward, None where only examples bound it."""
        return self._sources[0].most_tokens

    @property
    def searching(self) -> bool:
        """Whether several processes still look for what fits."""
        return self.auto and self._steps_left > 0

    def begin(self, runtime: Runtime, run: RunFolder) -> None:
        """Take over what an earlier part of this run has found, on the same device under the same
        settings; a collective."""
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
        """Count a step that fitted; the search ends after some."""
        if self.searching:
            self._steps_left -= 1
            if not self._steps_left and is_main:
                log.info("tokens_per_micro_batch: %s from here on", self.tokens)

    def halve(self, step: int, folder: Path, *, writes: bool) -> int:
        """Halve what the largest forward of `step` takes, and note it in the run folder; the same
        on every process.

        Args:
            writes: whether this is the process that notes it.

        Returns:
            Most tokens of a forward from here on.

        Raises:
            UserError: it is the longest example already.
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
    """Digest of what the memory of a forward depends on: `MEMORY`, and the device."""
    device: Any = runtime.device.type
    if runtime.device.type == "cuda":
        properties = torch.cuda.get_device_properties(runtime.device)
        device = [properties.name, properties.total_memory]
    said = {}
    for section, names in MEMORY.items():
        values = run.record.get(section)
        if isinstance(values, dict) and names:
            values = {name: values.get(name) for name in names.split()}
        said[section] = values
    facts = json.dumps([device, said], sort_keys=True, default=str)
    return hashlib.sha256(facts.encode()).hexdigest()
