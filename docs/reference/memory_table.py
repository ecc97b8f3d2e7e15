"""The table of `docs/reference/memory.md`: `python docs/reference/memory_table.py` prints it."""

from __future__ import annotations

from plan_table import MODELS as SIZES
from plan_table import shapes_of

from modern_llm.planning.memory import ParallelLayout, Parameter, plan_memory

MODELS = {name: SIZES[name] for name in ("1B", "8B", "70B")}
WORLDS = (8, 64, 512)


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | GPUs | ZeRO | weights | gradients | optimizer | reference | activations "
        "| head | buffers | GiB a GPU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, sizes in MODELS.items():
        parameters = [Parameter(shape) for shape in shapes_of(sizes).values()]
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
