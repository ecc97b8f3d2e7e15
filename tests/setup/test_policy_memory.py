"""A LoRA run in 16 bits never holds its frozen base in float32."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from modern_llm.config import LoraConfig, TrainingConfig
from modern_llm.distributed.freed_memory import release_freed_memory
from modern_llm.distributed.runtime import start
from modern_llm.models.load import inspect_checkpoint
from modern_llm.setup.policy import set_up_policy
from tests.distributed.test_sharded_start import Peak
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import use_deepspeed

SHAPE = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12,
    "num_attention_heads": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
ROOM = 150e6
"""Bytes for the probe, which measures the first layers in float32, and for libraries."""


def started(place: Path) -> tuple[int, int, int]:
    """Return the peak of anonymous memory of a start, and the bytes and the most of one weight."""
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    use_deepspeed(None, place)
    config = TrainingConfig(
        run_name="x", output_dir=place, mixed_precision="bf16", attention="separate"
    )
    with start(config) as runtime:
        checkpoint = inspect_checkpoint(place)
        gc.collect()
        release_freed_memory()
        peak = Peak()
        scorer = set_up_policy(runtime, checkpoint, config, LoraConfig(rank=4), dropout=False)
        found = peak.stop()
        sizes = [p.numel() * p.element_size() for p in scorer.parameters()]
        products = [m.weight.dtype for m in scorer.modules() if isinstance(m, nn.Linear)]
        assert products.count(torch.bfloat16) == 7 * 12 + 1
        assert not any(hasattr(p, "unread") for p in scorer.parameters())
        return found, sum(sizes), 2 * max(sizes)


@pytest.mark.slow
def test_no_copy_of_the_base_in_float32_is_ever_held(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (extra: lora)")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    everything = 4 * model.num_parameters()
    model.save_pretrained(tmp_path)
    del model
    ((peak, held, largest),) = run_ranks(started, 1, tmp_path, timeout=200)
    assert held < 0.6 * everything
    assert peak < held + largest + ROOM, (peak, held, everything)
