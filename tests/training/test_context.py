"""The watchdog allows forwards time to compile: in training and in evaluations alike."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modern_llm.distributed.health.heartbeat import COMPILE_S
from modern_llm.training.context import TrainingContext


@pytest.mark.parametrize(
    ("device", "compiles", "seconds"),
    [("cpu", False, 0.0), ("cpu", True, COMPILE_S), ("cuda", False, COMPILE_S)],
)
def test_a_forward_that_may_compile_has_an_allowance(device, compiles, seconds):
    context = object.__new__(TrainingContext)
    context.runtime = SimpleNamespace(device=torch.device(device))
    context.run = SimpleNamespace(config=SimpleNamespace(compile=compiles))
    assert context.compile_s == seconds
