"""Release a DeepSpeed engine completely, so that a process can run many trainings.

`engine.destroy()` removes its hooks, but ZeRO-3 keeps the model in two tables of its modules that
have no call to clear them. Read in DeepSpeed 0.19.8; a version without them is left alone.
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
    """Drop what DeepSpeed's modules keep of a model whose engine has ended or never started."""
    # Each engine leaves its model at the bottom of this stack, and an error within a forward leaves
    # the modules that were entered.
    stack = getattr(sys.modules.get(OFFLOAD), "FWD_MODULE_STACK", None)
    if stack is not None:
        gone = {id(module) for module in model.modules()}
        stack[:] = [module for module in stack if id(module) not in gone]
    # A method's lru_cache without a bound, whose keys are coordinators and modules. What another
    # engine has in it is computed again.
    coordinator = getattr(sys.modules.get(COORDINATOR), "PartitionedParameterCoordinator", None)
    for function in vars(coordinator).values() if coordinator is not None else ():
        # The cache is behind a decorator that keeps it in its closure.
        cells = getattr(function, "__closure__", None) or ()
        for held in (function, *(cell.cell_contents for cell in cells)):
            if clear := getattr(held, "cache_clear", None):
                clear()
