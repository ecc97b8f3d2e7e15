"""Activation memory of one long row: processes that share it hold their part each."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from modern_llm.distributed.freed_memory import large_blocks_apart
from modern_llm.distributed.sequence_group import sequence_group
from modern_llm.models.load import make_scorer
from modern_llm.models.training_mode import recompute_activations
from tests.helpers.ranks import run_ranks

TOKENS, DOCUMENT = 65_536, 2_048
SHAPE = {
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 300, "max_position_embeddings": DOCUMENT,
}  # fmt: skip


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no line RssAnon")


def row(tokens: int) -> tuple[torch.Tensor, ...]:
    """Ids, positions, segments and targets of one row of documents."""
    place = torch.arange(tokens)
    ids = torch.randint(3, 300, (1, tokens), generator=torch.Generator().manual_seed(0))
    segments = torch.stack([place // DOCUMENT, torch.zeros_like(place)], -1)[None]
    states = place[:-1][place[:-1] % DOCUMENT < DOCUMENT - 1]
    return ids, (place % DOCUMENT)[None], segments, torch.stack([states, ids[0, states + 1]])


def forward_and_backward(size: int) -> tuple[int, float, torch.Tensor]:
    """On one rank: the bytes that a forward and backward of the row take, loss and a gradient."""
    if size > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    scorer = make_scorer(model, dropout=False, sequence=sequence_group(size)).train()
    recompute_activations(model)
    scorer(*row(2 * DOCUMENT)).logprobs.mean().backward()  # buffers of libraries
    scorer.zero_grad()
    before, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with large_blocks_apart():  # else the heap keeps what is freed of the smaller tensors
        loss = -scorer(*row(TOKENS)).logprobs.mean()
        loss.backward()
    done.set()
    watcher.join()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    return most[0] - before, float(loss.detach()), grad


@pytest.mark.slow
def test_four_processes_hold_a_part_of_a_row_of_65536_tokens():
    ((alone, loss, grad),) = run_ranks(forward_and_backward, 1, 1, timeout=500)
    shared = run_ranks(forward_and_backward, 4, 4, timeout=500)
    print(f"one process {alone / 1e6:.0f} MB, four {[round(s[0] / 1e6) for s in shared]} MB")
    for bytes_, other, _ in shared:
        assert other == pytest.approx(loss, rel=1e-5)
        assert bytes_ < 0.35 * alone
    torch.testing.assert_close(sum(s[2] for s in shared), grad, rtol=1e-4, atol=1e-7)
