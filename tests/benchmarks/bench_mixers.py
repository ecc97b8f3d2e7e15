"""Trees over separate rows in models with a state: forward and backward of the same pairs.

    python tests/benchmarks/bench_mixers.py [--data hh.jsonl] [--models lfm2,mamba2] [--pairs 8]

Two sets of pairs, as in `bench_trees.py`: HH-RLHF transcripts, and conversations whose prompt has
three times the tokens of an answer. The models are random, of width 256 and three or four layers.
Separate rows are padded to the longest of eight pairs of similar length. Each model is a separate
process, in which the sides alternate. Timed: processor time, without the first round.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_trees import as_they_are, talks
from measuring import (
    PAIRS_A_STEP,
    SEED,
    VOCABULARY,
    Figure,
    apart,
    parsed,
    parser,
    read_lines,
    read_transcripts,
    say,
    verdicts,
    write_lines,
    write_tokenizer,
)

REQUIRED = {"hh": 1.3, "talks": 1.6}
WIDTH = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHAPE = WIDTH | {
    "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_next": SHAPE | {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_experts": 0,
        "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64, "mlp_only_layers": [0, 1, 2, 3],
    },
    "falcon_h1": SHAPE | MAMBA | {"mamba_d_ssm": 512},
    "granitemoehybrid": SHAPE | MAMBA | {
        "layer_types": ["mamba", "mamba", "mamba", "attention"], "num_local_experts": 0,
        "num_experts_per_tok": 0, "shared_intermediate_size": 688,
    },
    "lfm2": SHAPE | {
        "layer_types": ["conv", "full_attention"] * 2, "block_ff_dim": 688,
        "block_auto_adjust_ff_dim": False,
    },
    "mamba2": WIDTH | {
        "num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 64, "chunk_size": 64,
    },
}  # fmt: skip


def prepare(options: argparse.Namespace) -> dict[str, int]:
    """Write the token ids of both sets of pairs."""
    pairs = read_transcripts(options.data)
    tokenizer = write_tokenizer(pairs, options.folder / "model", VOCABULARY)
    draw = random.Random(SEED)
    made = {make: rows(pairs, options.pairs, tokenizer, draw) for make, rows in KINDS.items()}
    for name, texts in made.items():
        ids = [
            {side: tokenizer(pair[side])["input_ids"] for side in ("prompt", "chosen", "rejected")}
            for pair in texts
        ]
        write_lines(options.folder / f"{name}.jsonl", ids)
    return {name: len(texts) for name, texts in made.items()}


KINDS = {"hh": as_they_are, "talks": talks}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one model on one set of pairs: `MODEL:SET`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, set_seed

    from modern_llm.models.load import make_scorer

    name, kind = options.side.split(":")
    pairs = read_lines(options.folder / f"{kind}.jsonl")
    scorers = {}
    for attention in ("separate", "tree"):
        set_seed(SEED)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**MODELS[name]))
        scorers[attention] = make_scorer(model, attention, dropout=False).train()
    seconds: dict[str, list[float]] = {attention: [] for attention in scorers}
    for _ in range(options.repeats + 1):
        for attention, scorer in scorers.items():
            began = time.process_time()
            forward_and_backward(scorer, pairs)
            seconds[attention].append(time.process_time() - began)
    best = {attention: min(times[1:]) for attention, times in seconds.items()}
    return {
        "rows_pairs_per_s": len(pairs) / best["separate"],
        "trees_pairs_per_s": len(pairs) / best["tree"],
        "ratio": best["separate"] / best["tree"],
        "mixers": ", ".join(scorers["tree"].capabilities.mixers),
    }


def forward_and_backward(scorer: Any, pairs: list[dict[str, list[int]]]) -> None:
    """Compute all pairs once, eight of similar length in a forward."""
    import numpy as np

    from modern_llm.data.batch.collate import collate
    from modern_llm.data.batch.prefix_tree import Examples
    from modern_llm.setup.micro_batches import sharing
    from tests.helpers.models import Table

    table = Table([list(pair.values()) for pair in pairs])
    examples = Examples(table, trees=scorer.capabilities.trees)
    order = np.argsort(-table.lengths.sum(1))
    for start in range(0, len(order), PAIRS_A_STEP):
        batch = collate(examples, order[start : start + PAIRS_A_STEP], shared=sharing(scorer))
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        output.logprobs.sum().backward()
        scorer.zero_grad()


def main() -> int:
    """Run all measurements, or one (`--side`)."""
    options = parse()
    if options.side:
        print(json.dumps(prepare(options) if options.side == "prepare" else run(options)))
        return 0
    figures = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        given = {"data": options.data, "pairs": options.pairs, "repeats": options.repeats}
        print(apart(__file__, "prepare", Path(folder), options.threads, **given), flush=True)
        for name in options.models.split(","):
            for kind, required in REQUIRED.items():
                side = f"{name}:{kind}"
                found = apart(__file__, side, Path(folder), options.threads, **given)
                say(side, found)
                figures.append(Figure(f"{name}, {kind}, trees : rows", found["ratio"], required))
    verdicts(figures)
    return 0


def parse() -> argparse.Namespace:
    """Options for the user, and hidden ones for a single measurement."""
    found = parser(__doc__, repeats=3)
    found.add_argument("--models", default=",".join(MODELS), help="which, with commas between")
    found.add_argument("--pairs", type=int, default=PAIRS_A_STEP, help="pairs of each set")
    options = parsed(found)
    unknown = sorted(set(options.models.split(",")) - set(MODELS))
    if unknown:
        found.error(f"--models {', '.join(unknown)}: not among {', '.join(MODELS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
