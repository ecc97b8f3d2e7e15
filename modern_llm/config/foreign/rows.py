"""One row of the tables of other trainers' options, and what a table is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

CHECKPOINT = "sft_checkpoint|pretrain_checkpoint|train.tokenizer_name"
LENGTH = "dpo.max_length|data.max_length|model.max_seq_len"
"""Options whose name depends on the stage: of DPO, SFT and pretraining."""

BATCH = "the examples of one optimizer step over all processes"
BEST = "the best checkpoint is output_dir/best; the final model is that of the last step"
FIXED_DROPOUT = "DPO trains without dropout, so it is used in SFT alone"
TEMPLATE = "messages use the tokenizer's own template; `chat` wraps string prompts with it"


class Row(NamedTuple):
    """One option of another trainer that has an equivalent here."""

    ours: str
    """Our option, `SECTION.NAME`; with `|` between them, those of DPO, SFT and pretraining."""
    rule: str = "same"
    """How its value is computed: a function of `verbs/migration/rules.py`."""
    note: str = ""
    """What is different here; empty where the meaning is the same."""

    @property
    def targets(self) -> list[str]:
        """The options here, one a stage; none where the rule alone says what happens."""
        return self.ours.split("|") if self.ours else []

    def target(self, stage: str) -> str:
        """Return our option in a stage."""
        found = self.targets or [""]
        named_as = "dpo" if stage == "kto" else stage
        one = found[0] if len(found) == 1 else found[("dpo", "sft", "pretrain").index(named_as)]
        # The options of KTO have the names of DPO's, in a section of their own.
        return f"kto.{one[4:]}" if stage == "kto" and one.startswith("dpo.") else one


@dataclass(frozen=True)
class Tool:
    """The options of one trainer: each name is in one of the three tables."""

    name: str
    rows: Mapping[str, Row]
    not_needed: Mapping[str, str]
    """Reason -> names (with spaces between them) of options that need no option here."""
    no_equivalent: Mapping[str, str]
    """Reason -> names of options that nothing here does."""
    defaults: Mapping[str, Any]
    """Values of its options where a file sets none and our default differs."""

    def reason(self, name: str) -> str:
        """Return why an option has no row, or nothing."""
        return _reason(self.not_needed, name) or _reason(self.no_equivalent, name)

    def group(self, name: str) -> str:
        """Return the table that holds a name: rows, not needed, no equivalent; "" for none."""
        if name in self.rows:
            return "rows"
        if _reason(self.not_needed, name):
            return "not needed"
        return "no equivalent" if _reason(self.no_equivalent, name) else ""

    def names(self) -> set[str]:
        """Return every option that the tables hold."""
        groups = [*self.not_needed.values(), *self.no_equivalent.values()]
        return {*self.rows, *(name for group in groups for name in group.split())}


def _reason(groups: Mapping[str, str], name: str) -> str:
    return next((reason for reason, names in groups.items() if name in names.split()), "")
