"""The fused CPU operations against the architecture's own: values, gradients, kept memory."""

from __future__ import annotations

import pytest
import torch

from modern_llm.models.cpu import fused_ops
from tests.helpers.models import CONFIGS, make_model

# name -> norms, gated products and rotary attentions that are replaced (3 layers each)
FOUND = {
    "llama": (7, 3, 3),
    "qwen2": (7, 3, 3),
    "qwen3": (13, 3, 3),
    "mistral": (7, 3, 3),
    "gemma2": (13, 0, 3),
    "gemma3": (19, 0, 3),
    "gpt2": (0, 0, 0),
    "phi3": (7, 0, 3),
    "granite": (7, 3, 3),
    "cohere": (0, 3, 0),
}


def outputs_and_gradients(model):
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(4))
    logits = model(input_ids=ids, use_cache=False).logits
    g = torch.Generator().manual_seed(5)
    (logits * torch.randn(logits.shape, generator=g)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_patched_model_gives_the_same_values_and_gradients(name):
    expected, gradients = outputs_and_gradients(make_model(name))
    model = make_model(name)
    with torch.no_grad():  # weights of norms that differ from element to element
        for plain in (model, other := make_model(name)):
            g = torch.Generator().manual_seed(6)
            for parameter in plain.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=g)
    expected, gradients = outputs_and_gradients(other)
    counts = fused_ops.patch_cpu_ops(model)
    if name in FOUND:
        assert tuple(counts.values()) == FOUND[name]
    logits, ours = outputs_and_gradients(model)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert set(ours) == set(gradients)
    for n, gradient in ours.items():
        torch.testing.assert_close(
            gradient, gradients[n], rtol=1e-3, atol=2e-4, msg=lambda m, n=n: f"{n}: {m}"
        )
    fused_ops.restore_ops(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_functions_equal_their_definitions_by_gradcheck():
    g = torch.Generator().manual_seed(0)
    x, gate, up = (
        torch.randn(3, 4, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    weight = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    for offset in (0.0, 1.0):
        assert torch.autograd.gradcheck(
            lambda x, w, offset=offset: fused_ops._RMSNorm.apply(x, w, 1e-5, offset), (x, weight)
        )
    assert torch.autograd.gradcheck(fused_ops._SiluProduct.apply, (gate, up))
    down, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6), (5,))
    )
    assert torch.autograd.gradcheck(fused_ops._DownProduct.apply, (gate, up, down, bias))
    assert torch.autograd.gradcheck(fused_ops._DownProduct.apply, (gate, up, down.detach(), None))
    query, key = (
        torch.randn(2, h, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
        for h in (3, 1)
    )
    angles = torch.randn(2, 5, 2, generator=g, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(
        lambda q, k: fused_ops.rotary(q, k, angles.cos(), angles.sin()), (query, key)
    )


def test_a_module_that_only_looks_similar_is_not_patched():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    module = torch.nn.Sequential(OddRMSNorm())
    assert fused_ops.patch_cpu_ops(module)["norms"] == 0
    assert "forward" not in module[0].__dict__


def test_a_projection_with_a_hook_is_called_as_a_module():
    """ZeRO-3 gathers a weight in the hooks of its module; an adapter is a module of its own."""
    model, calls = make_model("llama"), []
    expected = torch.autograd.grad(_loss(model), list(model.parameters()))
    fused_ops.patch_cpu_ops(model)
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda module, given: calls.append(module))
    found = torch.autograd.grad(_loss(model), list(model.parameters()))
    assert calls == [down]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def _loss(model):
    logits = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits
    return logits.logsumexp(-1).sum()


def test_other_dtypes_use_the_models_own_functions():
    model = make_model("llama")
    fused_ops.patch_cpu_ops(model)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        wide = model.double()(input_ids=ids, use_cache=False).logits
        expected = make_model("llama", torch.float64)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(wide, expected, rtol=0, atol=0)


def test_less_is_kept_for_the_backward():
    kept = {}
    for slim in (False, True):
        model = make_model("llama")
        if slim:
            fused_ops.patch_cpu_ops(model)
        sizes = {}

        def note(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            states = model.base_model(input_ids=torch.arange(3, 90)[None], use_cache=False)
        kept[slim] = sum(size for at, size in sizes.items() if at not in weights)
        del states
    assert kept[True] < 0.8 * kept[False]
