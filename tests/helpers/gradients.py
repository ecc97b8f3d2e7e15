"""Sums of log-probs and their gradients: by a model's own plain forward, and by a scorer."""

from __future__ import annotations

import copy

import numpy as np
import torch

from modern_llm.data.batch.collate import collate
from modern_llm.data.batch.prefix_tree import Examples


def plain(model, table, weights):
    """Return sums and gradients in float64, one unpadded sequence at a time; in float32 for
    families whose code supports only that."""
    try:
        return plain_in(torch.float64, model, table, weights)
    except RuntimeError:
        return plain_in(torch.float32, model, table, weights)


def plain_in(dtype, model, table, weights):
    """Return the same in `dtype`; `weights` (P, 2) multiply the sums in the gradient."""
    wide = copy.deepcopy(model).to(dtype)
    wide.set_experts_implementation("eager")
    sums = torch.zeros(len(table), 2, dtype=torch.float64)
    for i in range(len(table)):
        prompt = table.ids(i, "prompt").tolist()
        for side, column in enumerate(("chosen", "rejected")):
            ids = torch.tensor([prompt + table.ids(i, column).tolist()])
            logits = wide(input_ids=ids, use_cache=False).logits[0].double()
            logprobs = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            total = logprobs[len(prompt) - 1 :].sum()
            (total * weights[i, side]).backward()
            sums[i, side] = total.detach()
    return sums, {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}


def asked(scorer, table, shared, groups, weights):
    """The same with the scorer, in forwards of the given groups."""
    scorer.zero_grad()
    examples = Examples(table, trees=scorer.capabilities.trees)
    sums = torch.zeros(len(table), 2, dtype=torch.float64)
    for group in groups:
        batch = collate(examples, np.array(group), shared=shared)
        output = scorer(batch.ids, batch.positions, batch.segments, batch.targets)
        found = batch.sums(output.logprobs)
        (found.double() * weights[batch.examples]).sum().backward()
        sums[batch.examples] = found.detach().double()
    return sums, {n: p.grad for n, p in scorer.model.named_parameters() if p.grad is not None}
