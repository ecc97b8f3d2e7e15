"""Check at load that a model computes the same where processes share its rows.

Each process has a part of the tokens (`attention.sequence`). A layer besides the attention that
reads other tokens, or a position that depends on the length of the part, shows here.
"""

from __future__ import annotations

from collections.abc import Sequence

from modern_llm.config.errors import UserError
from modern_llm.models.attention.sequence import SequenceGroup
from modern_llm.models.scorer import Capabilities
from modern_llm.models.subject import Subject


def check_split(
    subjects: Sequence[Subject],
    capabilities: Capabilities,
    notes: Sequence[str],
    group: SequenceGroup | None,
) -> None:
    """Refuse a model whose rows cannot be split over the processes of `group`, if there is one.

    Args:
        subjects: the model first; all of them were measured on whole rows.
        notes: why a feature is off.
    """
    if group is None:
        return
    place = f"train.sequence_parallel {group.size}: {type(subjects[0].model).__name__}"
    if not capabilities.trees:
        raise UserError(
            f"{place} runs without the tree attention, which alone can be split: use 1 "
            f"({'; '.join(notes)})"
        )
    if capabilities.mixers:
        raise UserError(
            f"{place} has layers with a state ({', '.join(capabilities.mixers)}), which read a row "
            "from its start to its end: use 1"
        )
    odd = [call.heads for call in subjects[0].calls if call.heads % group.size]
    if odd:
        raise UserError(
            f"{place} has {max(odd)} attention heads, which {group.size} processes cannot share "
            "evenly: use a divisor"
        )
    for subject in subjects:
        if any(call.heads % group.size for call in subject.calls):
            continue  # a small model whose number of heads is fixed by its architecture
        subject.sequence = group
        why = subject.differs(subject.shared)
        subject.sequence = None
        if why:
            raise UserError(f"{place}: a row that processes share {why}: use 1")
