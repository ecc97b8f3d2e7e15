"""Lowering of compiled code for CUDA without a GPU: inductor writes the kernels, none of them runs.

The graphs are traced on the CPU. Before the lowering their tensors become fake CUDA tensors,
because a build without CUDA cannot index a fake CUDA tensor in Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx, select_algorithm
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
# What inductor asks of a device: an H100's.
H100 = SimpleNamespace(
    name="NVIDIA H100", type="cuda", index=0, major=9, minor=0, cc=90, warp_size=32,
    multi_processor_count=132, total_memory=80 << 30, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10, shared_memory_per_multiprocessor=228 << 10,
    gcnArchName="",
)  # fmt: skip


@contextmanager
def lowered_for_cuda(function: Callable) -> Iterator[tuple[Callable, list[str]]]:
    """Yield `function` compiled as for CUDA, and the names of the kernel templates that its graphs
    use. Its results have the right shapes and no values."""
    kernels: list[str] = []

    def lower(graph: torch.fx.GraphModule, inputs: list, **options: object) -> Callable:
        run = _without_values(graph)
        # The passes that real compilation runs before it lowers.
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph, bool(options.get("is_inference")))
        _lower(graph, inputs)
        return run

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        return compile_fx.compile_fx(graph, inputs, inner_compile=lower)

    append = select_algorithm.TritonTemplate.maybe_append_choice

    def noted(template: select_algorithm.TritonTemplate, *of: object, **more: object) -> object:
        kernels.append(template.name)
        return append(template, *of, **more)

    torch._dynamo.reset()
    with (
        mock.patch.object(select_algorithm.TritonTemplate, "maybe_append_choice", noted),
        mock.patch.object(torch_flex, "_validate_device", lambda *_: None),
        mock.patch("torch.cuda.get_device_properties", lambda *_: H100),
        mock.patch.object(CudaInterface, "get_device_properties", lambda *_: H100),
        mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "none"),
        mock.patch.object(select_algorithm.PyCodeCache, "load", _unloaded),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        yield torch.compile(function, backend=backend, dynamic=True, fullgraph=True), kernels
    torch._dynamo.reset()


def _lower(graph: torch.fx.GraphModule, inputs: list) -> None:
    """Lower a graph to inductor's IR."""
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.args, node.kwargs = (tree_map(_placed, a) for a in (node.args, node.kwargs))
            if "val" in node.meta:
                node.meta["val"] = tree_map(_moved, node.meta["val"])
    moved = [_moved(each) for each in inputs]
    symbols = [each for each in inputs if isinstance(each, torch.SymInt)]
    shapes = symbols[0].node.shape_env if symbols else None
    lowering = GraphLowering(graph, example_inputs=moved, shape_env=shapes)
    with V.set_fake_mode(torch._guards.detect_fake_mode(moved)), V.set_graph_handler(lowering):
        lowering.run(*moved)


def _unloaded(source: str, *_: object, **more: object) -> SimpleNamespace:
    """Stand for the module of a kernel, which needs Triton."""
    key = hashlib.sha256(source.encode()).hexdigest()
    return SimpleNamespace(__file__=f"{key}.py", key=key)


def _placed(value: object) -> object:
    return CUDA if isinstance(value, torch.device) else value


def _moved(value: object) -> object:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)


def _without_values(graph: torch.fx.GraphModule) -> Callable:
    """Return a function with the outputs of `graph`, unset."""
    nodes = list(graph.graph.nodes)
    inputs = [node.meta["val"] for node in nodes if node.op == "placeholder"]
    outputs = [
        node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in nodes[-1].args[0]
    ]

    def run(arguments: list) -> list:
        known = {}
        for symbol, value in zip(inputs, arguments, strict=True):
            pairs = [(symbol, value)]
            if isinstance(symbol, torch.Tensor):
                pairs = [*zip(symbol.size(), value.size(), strict=True)]
                pairs += zip(symbol.stride(), value.stride(), strict=True)
            known |= {s.node.expr: n for s, n in pairs if isinstance(s, torch.SymInt)}

        def number(size: int | torch.SymInt) -> int:
            return int(size.node.expr.subs(known)) if isinstance(size, torch.SymInt) else size

        def empty(like: torch.Tensor) -> torch.Tensor:
            sizes, strides = (list(map(number, each)) for each in (like.size(), like.stride()))
            return torch.empty_strided(sizes, strides, dtype=like.dtype)

        arguments.clear()
        return [
            torch.empty_strided(
                *(list(map(number, n)) for n in (o.size(), o.stride())), dtype=o.dtype
            )
            if isinstance(o, torch.Tensor)
            else number(o)
            for o in outputs
        ]

    run._boxed_call = True
    return run
