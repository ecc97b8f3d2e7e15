"""One step on a long row, in a process of its own: its peak is what `plan` says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from modern_llm.planning.memory import ParallelLayout, Sizes, activation_bytes, head_bytes

# The widths of Qwen2.5-0.5B; two of its 24 layers, which all keep the same.
SIZES = {"layers": 2, "hidden": 896, "mlp": 4864, "heads": 14, "kv_heads": 2, "head_dim": 64}
VOCABULARY, DOCUMENT = 2000, 512
"""Of its vocabulary a part: the head's memory is bounded by its own chunks. Tokens of a document,
because attention over a whole row takes hours on a CPU and keeps the same."""

PROCESS = 64 << 20
"""What threads, their stacks and kernels' buffers take of a process, whatever the row."""

STEP = """
import gc, sys
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
from modern_llm.models.chunked_mlp import chunk_feed_forward
from modern_llm.models.load import make_scorer
from modern_llm.models.training_mode import recompute_activations

layers, tokens, chunk, document, vocabulary = map(int, sys.argv[1:])
config = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=vocabulary, max_position_embeddings=tokens,
)
model = AutoModelForCausalLM.from_config(config)
scorer = make_scorer(model, "blocks", lean=False).train()
chunk_feed_forward(model, chunk)
recompute_activations(model)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
ids = torch.randint(0, vocabulary, (1, tokens))
number = tokens // document
positions = torch.arange(document).repeat(number)[None]
trees = torch.arange(number).repeat_interleave(document)
segments = torch.stack([trees, torch.zeros_like(trees)], -1)[None]
sources = torch.arange(0, tokens - 1, 8)

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return 1024 * int(line.split()[1])

gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before = status("VmRSS")
output = scorer(ids, positions, segments, torch.stack([sources, ids[0, sources + 1]]))
output.logprobs.sum().backward()
print(status("VmHWM") - before, len(sources))
"""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("tokens", "chunk"),
    [
        pytest.param(8192, 1024, marks=pytest.mark.slow),
        pytest.param(65_536, 4096, marks=pytest.mark.long),
    ],
)
def test_the_peak_of_a_long_row_is_within_ten_percent_of_the_plan(tokens, chunk):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux' /proc")
    arguments = [SIZES["layers"], tokens, chunk, DOCUMENT, VOCABULARY]
    # Large blocks go back to the system at once: what is freed is not counted.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    found = subprocess.run(
        [sys.executable, "-c", STEP, *map(str, arguments)],
        env=environment, text=True, capture_output=True, check=True,
    )  # fmt: skip
    peak, targets = map(int, found.stdout.split()[-2:])
    sizes = Sizes(**SIZES, vocabulary=VOCABULARY)
    setting = ParallelLayout(tokens=tokens, targets=targets, checkpointing=True, mlp_chunk=chunk)
    planned = activation_bytes(sizes, setting) + head_bytes(sizes, setting)
    assert 0.9 * planned <= peak <= planned + PROCESS, (peak, planned)
