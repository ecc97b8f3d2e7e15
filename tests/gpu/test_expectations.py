"""What was concluded about GPUs without one: each test is one conclusion that a GPU confirms."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from modern_llm.distributed import launcher
from modern_llm.models import head
from modern_llm.models.attention import agreement, flex
from modern_llm.models.attention.prefix_tree import Call
from modern_llm.models.load import make_scorer
from tests.gpu.test_training import LOW, inputs, near, sharded
from tests.helpers.models import SHAPE, make_model, random_pairs, score
from tests.helpers.ranks import run_ranks
from tests.helpers.zero import Case, dpo

pytestmark = pytest.mark.gpu
__all__ = ["inputs"]  # the fixture

GPU = torch.device("cuda", 0)


def test_fsdp2_in_bfloat16_trains_like_ddp(tmp_path, inputs):
    plain = dpo(*inputs, Case(tmp_path / "plain", train=LOW))
    (found,) = run_ranks(sharded, 1, *inputs, Case(tmp_path / "fsdp", train=LOW), timeout=300)
    near(found, plain, 2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (64, 8), (28, 4), (8, 1)])
def test_every_head_shape_has_fused_kernels_forward_and_backward(heads, dtype):
    calls = [
        Call(*heads, width, width, None, softcap, window)
        for width, softcap, window in [(64, None, None), (128, None, 512), (128, 30.0, None)]
    ]
    assert agreement.why_not("flex", calls, GPU, dtype) == ""


def test_weights_on_the_host_are_probed_for_the_fused_attention_of_the_device():
    config = tf.Gemma2Config(**SHAPE | {"head_dim": 32}, sliding_window=4096)
    model = tf.AutoModelForCausalLM.from_config(config)
    capabilities = make_scorer(model, device=GPU, dtype=torch.bfloat16).capabilities
    assert capabilities.backend == "flex", capabilities.notes


@torch.no_grad()
def test_rows_of_any_length_are_scored_by_the_fused_attention():
    expected, _ = score(make_scorer(make_model("llama")).eval(), random_pairs([(9, 4, 13)]))
    scorer = make_scorer(make_model("llama").to(GPU)).eval()
    assert scorer.capabilities.backend == "flex", scorer.capabilities.notes
    found, _ = score(_OnGpu(scorer), random_pairs([(9, 4, 13)]))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


class _OnGpu:
    """A scorer whose inputs are moved to the GPU, and whose results come back."""

    def __init__(self, scorer):
        self.scorer, self.capabilities = scorer, scorer.capabilities

    def __call__(self, *inputs):
        output = self.scorer(*(tensor.to(GPU) for tensor in inputs))
        return output._replace(parts=output.parts.cpu())


def test_the_heads_gradient_is_summed_in_float32_by_one_operation():
    assert head.sums_in_float32(GPU, torch.bfloat16)
    rows = head.chunk_rows(128_256, GPU, 2)
    assert rows >= 1024 and rows % 128 == 0


def test_more_attention_variants_than_torchs_limit_stay_fused():
    segments = torch.zeros(1, 256, 2, dtype=torch.long, device=GPU)
    positions = torch.arange(256, device=GPU)[None]
    mask = flex.block_mask(segments, positions, None)
    for at in range(12):
        tensors = [torch.randn(1, 4, 256, 64, device=GPU, requires_grad=True) for _ in range(3)]
        flex.attend(*tensors, mask, None, 20.0 + at, 0.0).sum().backward()


def segments_grow() -> bool:
    launcher.grow_segments()
    torch.ones(1, device=GPU)
    return any(part["is_expandable"] for part in torch.cuda.memory_snapshot())


def test_the_allocator_grows_its_segments(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert run_ranks(segments_grow, 1) == [True]
