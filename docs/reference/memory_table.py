"""The table of `docs/reference/memory.md`: `python docs/reference/memory_table.py` prints it."""

from __future__ import annotations

from modern_llm.planning.memory import ParallelLayout, Parameter, Sizes, plan_memory

# Shapes of the Llama family: layers, hidden, mlp, heads, kv_heads, head_dim, vocabulary.
MODELS = {
    "1B": Sizes(16, 2048, 8192, 32, 8, 64, 128_256),
    "8B": Sizes(32, 4096, 14_336, 32, 8, 128, 128_256),
    "70B": Sizes(80, 8192, 28_672, 64, 8, 128, 128_256),
}
WORLDS = (8, 64, 512)


def parameters_of(sizes: Sizes) -> list[Parameter]:
    """Return the parameters of a Llama of these sizes, head and embedding apart."""
    h, kv, q = sizes.hidden, sizes.kv_heads * sizes.head_dim, sizes.heads * sizes.head_dim
    layer = [(q, h), (kv, h), (kv, h), (h, q), (sizes.mlp, h), (sizes.mlp, h), (h, sizes.mlp)]
    layer += [(h,), (h,)]
    ends = [(sizes.vocabulary, h), (sizes.vocabulary, h), (h,)]
    return [Parameter(shape) for shape in [*ends, *(layer * sizes.layers)]]


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | GPUs | ZeRO | weights | gradients | optimizer | reference | activations "
        "| head | buffers | GiB a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        parameters = parameters_of(sizes)
        for world in WORLDS:
            for stage in (2, 3):
                setting = ParallelLayout(
                    world=world, stage=stage, precision="bf16", reference=True,
                    tokens=16_384, targets=8192, checkpointing=True,
                )  # fmt: skip
                memory = plan_memory(parameters, sizes, setting)
                parts = [memory.device[part] for part in (
                    "parameters", "gradients", "optimizer", "reference", "activations", "head",
                    "buffers",
                )]  # fmt: skip
                cells = [f"{size / 2**30:.1f}" for size in [*parts, memory.device_total]]
                lines.append(f"| {name} | {world} | {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
