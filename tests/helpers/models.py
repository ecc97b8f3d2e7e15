"""Tiny random models of many architectures, and log-probs by a model's own plain forward."""

from __future__ import annotations

import numpy as np
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.prefix_tree import Examples

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
WITHOUT_HEAD_DIM = {k: v for k, v in SHAPE.items() if k != "head_dim"}
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SHAPE),
    "llama_tied": lambda: tf.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen2_window": lambda: tf.Qwen2Config(
        **WITHOUT_HEAD_DIM, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: tf.Qwen3Config(**SHAPE),
    "mistral": lambda: tf.MistralConfig(**SHAPE, sliding_window=5),
    "gemma2": lambda: tf.Gemma2Config(
        **SHAPE, sliding_window=4, final_logit_softcapping=3.0, attn_logit_softcapping=2.0
    ),
    "gemma3": lambda: tf.Gemma3TextConfig(**SHAPE, sliding_window=4),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    ),
    "phi3": lambda: tf.Phi3Config(**WITHOUT_HEAD_DIM),
    "mixtral": lambda: tf.MixtralConfig(**SHAPE, num_local_experts=4, sliding_window=None),
    "granite": lambda: tf.GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=3.0),
    "cohere": lambda: tf.CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.3),
    "mamba": lambda: tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2),
}  # fmt: skip
# Attention of their own, or kinds of layer that no mask describes: they use separate rows, and a
# line in the log says so.
WITHOUT_TREES = {
    "falcon": lambda: tf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def make_model(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    config = (CONFIGS | WITHOUT_TREES)[name]()
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


class Table:
    """A token table in memory: columns prompt, chosen, rejected (or as named)."""

    levels = None

    def __init__(self, rows, columns=("prompt", "chosen", "rejected"), **numbers):
        import numpy as np

        self.columns = columns
        self.numbers = {name: np.array(values) for name, values in numbers.items()}
        self.rows = [[np.array(ids, dtype=np.int32) for ids in row] for row in rows]
        self.lengths = np.array([[len(ids) for ids in row] for row in self.rows])

    def __len__(self):
        return len(self.rows)

    def values(self, name):
        return self.numbers.get(name)

    def ids(self, index, column):
        return self.rows[index][self.columns.index(column)]


def random_pairs(sizes, vocabulary=97, seed=1):
    """Pairs of random ids (3 and up: no special ones) of the given (prompt, chosen, rejected)
    sizes."""
    g = torch.Generator().manual_seed(seed)
    return Table(
        [[torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in row] for row in sizes]
    )


def plain_sums(model, table):
    """(P, 2) log-prob sums, one unpadded sequence at a time, by the model's own forward."""
    result = torch.zeros(len(table), 2, dtype=torch.float64)
    for i in range(len(table)):
        prompt = table.ids(i, "prompt").tolist()
        for side, column in enumerate(("chosen", "rejected")):
            answer = table.ids(i, column).tolist()
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0].double()
            logprobs = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            result[i, side] = logprobs[max(len(prompt) - 1, 0) :].sum()
    return result


def score(scorer, table, indices=None, *, shared=None):
    """Return sums (P, 2) of some pairs by a scorer in one forward, and its whole output."""
    shared = scorer.capabilities.trees if shared is None else shared
    examples = Examples(table, trees=scorer.capabilities.trees)
    indices = np.arange(len(table)) if indices is None else np.asarray(indices)
    batch = collate(examples, indices, shared=shared)
    output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
    return batch.sums(output.logprobs), output
