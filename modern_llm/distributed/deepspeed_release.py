"""Release a DeepSpeed engine completely, so that a process can run many trainings.

`engine.destroy()` removes its hooks, but ZeRO-3 keeps the model in two module-level tables that no
call clears. Seen in DeepSpeed 0.19.8; for a version without them nothing is done.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"


def destroy(engine: Any) -> None:
    """End a DeepSpeed engine and drop every reference that DeepSpeed keeps to its model."""
    try:
        engine.destroy()
    finally:
        forget(engine.module)


def forget(model: nn.Module) -> None:
    """Drop DeepSpeed's references to a model whose engine has ended or failed to start."""
    # Each engine leaves its model at the bottom of this stack; an error within a forward leaves the
    # modules that it was in.
    stack = getattr(sys.modules.get(OFFLOAD), "FWD_MODULE_STACK", None)
    if stack is not None:
        gone = {id(module) for module in model.modules()}
        stack[:] = [module for module in stack if id(module) not in gone]
    # An unbounded lru_cache of a method, with coordinators and modules as keys. Entries of other
    # engines are computed again.
    coordinator = getattr(sys.modules.get(COORDINATOR), "PartitionedParameterCoordinator", None)
    for function in vars(coordinator).values() if coordinator is not None else ():
        # A decorator keeps the cache in its closure.
        cells = getattr(function, "__closure__", None) or ()
        for held in (function, *(cell.cell_contents for cell in cells)):
            if clear := getattr(held, "cache_clear", None):
                clear()
