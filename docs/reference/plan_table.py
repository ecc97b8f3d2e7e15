"""The second table of `docs/reference/memory.md`: this script prints it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from modern_llm.config import LoraConfig
from modern_llm.planning.memory import Sizes
from modern_llm.planning.planner import PlanRequest, plan

# Llama 3.2 and 3.1, Qwen2.5: layers, hidden, mlp, heads, kv_heads, head_dim, vocabulary.
MODELS = {
    "1B": Sizes(16, 2048, 8192, 32, 8, 64, 128_256),
    "8B": Sizes(32, 4096, 14_336, 32, 8, 128, 128_256),
    "32B": Sizes(64, 5120, 27_648, 40, 8, 128, 152_064),
    "70B": Sizes(80, 8192, 28_672, 64, 8, 128, 128_256),
}
GPUS = (1, 8, 64)
GB = 1e9
OPERATIONS = 0.4 * 989e12
"""Operations a second of one H100 in bf16 at 40% of its peak."""
INSIDE, BETWEEN = 450e9, 50e9
"""Bytes a second that one GPU sends over NVLink, and over its network card to other machines."""


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a decoder of these sizes, head and embedding apart."""
    h, kv, q = sizes.hidden, sizes.kv_heads * sizes.head_dim, sizes.heads * sizes.head_dim
    layer = {
        "self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q), "mlp.gate_proj": (sizes.mlp, h), "mlp.up_proj": (sizes.mlp, h),
        "mlp.down_proj": (h, sizes.mlp), "input_layernorm": (h,),
        "post_attention_layernorm": (h,),
    }  # fmt: skip
    table = (sizes.vocabulary, h)
    shapes = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (h,),
    }
    for number in range(sizes.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return shapes


def row_of(name: str, gpus: int, lora: LoraConfig | None) -> list[str]:
    """Return the cells of one row: the recommended preset, or what the last one would need."""
    sizes = MODELS[name]
    request = PlanRequest(
        model=name, gpus=gpus, gpus_per_node=8, gpu_memory=80 * 10**9, precision="bf16",
        longest=2048, lora=lora,
    )  # fmt: skip
    found = plan(shapes_of(sizes), asdict(sizes), request)
    rows = [row for row in found["rows"] if row["reference"] == "cache"]
    best = next((row for row in rows if row["preset"] == found["recommended"]), rows[-1])
    device = best["device"]
    parts = [device.get(part, 0) for part in ("parameters", "gradients", "optimizer")]
    parts.append(sum(device[part] for part in ("activations", "head", "buffers")))
    sent = ", ".join(f"{kind} {size / GB:.1f}" for kind, size in best["sent"].items()) or "none"
    recomputed = " *" if best["checkpointing"] else ""
    cells = [name, str(gpus), "LoRA" if lora else "full", best["preset"] + recomputed]
    cells += [f"{part / GB:.1f}" for part in parts]
    cells += [f"{best['device_total'] / GB:.1f}", f"{best['tokens'] or 0:,}", sent]
    return [*cells, bound(found, best, gpus, lora is not None)]


def bound(found: dict[str, Any], row: dict[str, Any], gpus: int, lora: bool) -> str:
    """Return what a step of one forward waits for, with both times."""
    if not row["fits"]:
        return "memory: does not fit"
    # Forward 2, backward 4 (2 where the weights are frozen), recomputation 2.
    each = (4 if lora else 6) + (2 if row["checkpointing"] else 0)
    computing = each * found["parameters"] * row["tokens"] / OPERATIONS
    sending = sum(row["sent"].values()) / (INSIDE if gpus <= 8 else BETWEEN)
    times = f"{computing:.2f} s, {sending:.2f} s"
    return f"{'computing' if computing >= sending else 'communication'} ({times})"


def table() -> str:
    """Return the table in Markdown."""
    head = (
        "model | GPUs | trained | preset | weights | gradients | optimizer | rest | GB a GPU "
        "| tokens a forward | GB sent by a GPU | bound"
    )
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for name in MODELS:
        for gpus in GPUS:
            for lora in (None, LoraConfig(rank=16)):
                lines.append("| " + " | ".join(row_of(name, gpus, lora)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
