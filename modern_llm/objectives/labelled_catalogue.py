"""Table of the losses of labelled responses (KTO), without torch.

A new loss is one row here and one function in `labelled.py`, decorated with `@loss("its name")`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class LabelledRow:
    """One loss. `kl`: it compares a reward with the KL divergence that is estimated in each step.

    `paper`: authors, arXiv number, and the equation.
    """

    name: str
    paper: str
    kl: bool = True


_ROWS = (
    LabelledRow("kto", "KTO, Ethayarajh et al. 2024, arXiv 2402.01306, eqs. 7 and 8"),
    LabelledRow(
        "apo_zero_unpaired",
        "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7 without pairs",
        kl=False,
    ),
)

LABELLED_LOSSES: Mapping[str, LabelledRow] = MappingProxyType({row.name: row for row in _ROWS})
