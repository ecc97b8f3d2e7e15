"""`register_loss`: a preference loss of a user, used like those of the catalogue."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from modern_llm.objectives import catalogue
from modern_llm.objectives.losses import FUNCTIONS


def register_loss(
    name: str,
    function: Callable[..., Tensor],
    *,
    reference: bool = True,
    lengths: bool = False,
    across_pairs: bool = False,
    margin: bool = False,
    divergence: bool = False,
    paper: str = "a user's own",
) -> None:
    """Add a loss that `dpo.loss_type` can name, in this process.

    Args:
        function: `(policy, [reference], [lengths], *, beta) -> losses (P,)`. `policy` and
            `reference` are (P, 2) sums of log-probs in nats, column 0 the chosen response;
            `lengths` are (P, 2) numbers of target tokens. Losses per pair, not their mean.
        reference: whether it reads the reference's log-probs.
        lengths: whether it reads the numbers of target tokens.
        across_pairs: whether it compares pairs and needs all of an optimizer step at once.
        margin: whether it is a function of beta times a difference of the two responses, from which
            the column `margin` of the data can be subtracted.
        divergence: whether it reads log-ratios alone, so that `dpo.f_divergence` can change them.

    Raises:
        ValueError: the name is taken by a loss of the package, or the function takes other
            arguments.
    """
    known = catalogue.LOSSES.get(name)
    if known is not None and not known.own:
        raise ValueError(f"register_loss: {name!r} is a loss of this package: choose another name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register_loss: the name {name!r} must be letters, digits and _")
    wanted = ["policy", *["reference"] * reference, *["lengths"] * lengths]
    try:
        inspect.signature(function).bind(*wanted, beta=0.1)
    except TypeError as error:
        raise ValueError(
            f"register_loss: {name} must be callable as ({', '.join(wanted)}, *, beta): {error}"
        ) from error
    catalogue.add_row(
        catalogue.LossRow(
            name,
            paper,
            reference=reference,
            lengths=lengths,
            across_pairs=across_pairs,
            margin=margin,
            divergence=divergence,
            own=True,
        )
    )
    FUNCTIONS[name] = function
