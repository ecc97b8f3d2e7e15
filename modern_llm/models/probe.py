"""What we claim of a foreign model is measured at load: trees, restarted positions and the fused
head.

A few random tokens are scored by the model's own plain forward, one sequence at a time, and again
as
trees through the fused head. A model that disagrees runs with separate rows or plain logits, and
the
log says so in one line. Called once by `load_scorer`, before the model is prepared for training.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.models.attention import (
    TREE_ATTENTION,
    Backend,
    backends,
    register_tree_attention,
)
from modern_llm.models.head import LogitTransform, fuse_head
from modern_llm.models.lean import slim, unslim
from modern_llm.models.narrow import narrow_last_layer
from modern_llm.models.routers import without_router_loss
from modern_llm.models.scorer import Abilities, TokenScorer

log = logging.getLogger(__name__)

# Largest difference of one token's log-prob between two orders of the same sums, by weight dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
# Layer kinds whose masks the tree attention reproduces. The probe's rows are shorter than any real
# window or chunk, so other kinds (chunked, linear) cannot be judged by it and are not tried.
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """Read from the configuration what the model does to its logits; the probe checks the
    reading."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return LogitTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def probe(
    model: PreTrainedModel,
    *,
    trees: bool = True,
    tried: tuple[Backend, ...] | None = None,
    lean: bool = True,
) -> Abilities:
    """Measure what `model` does exactly and leave it set up to be asked that way.

    Args:
        trees: False skips the tree part: the user asked for separate rows.
        tried: backends of the tree attention, the first that is exact serves; by device unless
            said.
        lean: on a CPU, put the functions of `lean` into the model.

    Side effects: the head becomes a `FusedHead` where that is exact, and the attention
    implementation the tree attention where that is.
    """
    training = model.training
    model.eval()
    notes: list[str] = []
    pairs = _random_pairs(model)
    native = model.config._attn_implementation
    plain = [_plain(model, prompt, answer) for prompt, *answers in pairs for answer in answers]
    tolerance = TOLERANCE[model.dtype]
    if lean and model.device.type == "cpu":
        _slim(model, pairs, plain, tolerance)

    head = model.get_output_embeddings()
    fused = head is not None and fuse_head(head, logit_transform(model))
    if fused:
        fused = _fused_is_exact(model, pairs, plain, tolerance)
    if not fused:
        notes.append(
            "plain logits: the head is not a linear layer, or differs from the model's own forward"
        )
    backend: Backend = "mask"
    windows: tuple[int | None, ...] = ()
    if trees:
        for backend in tried or backends(model.device):
            why, windows = _try_trees(model, fused, backend, pairs, plain, tolerance)
            if not why:
                break
            log.debug("%s: attention %s: %s", type(model).__name__, backend, why)
        if why:
            notes.append(f"separate rows: {why}")
            model.set_attn_implementation(native)
            trees = False
    model.train(training)
    for note in notes:
        log.info("%s: %s", type(model).__name__, note)
    return Abilities(trees=trees, fused=fused, backend=backend, windows=windows, notes=tuple(notes))


def _slim(
    model: PreTrainedModel, pairs: list[list[Tensor]], plain: list[Tensor], tolerance: float
) -> None:
    counts = slim(model)
    again = [_plain(model, prompt, answer) for prompt, *answers in pairs for answer in answers]
    worst = float((torch.cat(again) - torch.cat(plain)).abs().max())
    log.debug("%s: %s in fewer passes, %.2g nats off", type(model).__name__, counts, worst)
    if not worst <= tolerance:
        unslim(model)
    narrow_last_layer(model)


def _fused_is_exact(
    model: PreTrainedModel, pairs: list[list[Tensor]], plain: list[Tensor], tolerance: float
) -> bool:
    scorer = TokenScorer(model, Abilities(trees=False, fused=True))
    try:
        return _disagreement(scorer, pairs, plain) <= tolerance
    except Exception as error:  # foreign code: whatever it raises, it does not do
        log.debug("fused head in %s: %s", type(model).__name__, error)
        return False


def _try_trees(
    model: PreTrainedModel,
    fused: bool,
    backend: Backend,
    pairs: list[list[Tensor]],
    plain: list[Tensor],
    tolerance: float,
) -> tuple[str, tuple[int | None, ...]]:
    """Switch `model` to the tree attention.

    Returns:
        Why it does not do, or "" where it does; and the sliding windows that its layers ask for.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - KNOWN_LAYERS:
        return f"layers of kind {', '.join(sorted(kinds - KNOWN_LAYERS))}", ()
    register_tree_attention()
    scorer = TokenScorer(model, Abilities(trees=True, fused=fused, backend=backend))
    # The few tokens of the probe must go the way that long trees go.
    scorer.merge_below = 0
    try:
        model.set_attn_implementation(TREE_ATTENTION)
        if model.config._attn_implementation != TREE_ATTENTION:
            return "the architecture has an attention of its own", ()
        worst = _disagreement(scorer, pairs, plain)
    except Exception as error:  # foreign code: whatever it raises, it does not do
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return f"the tree attention does not run in it ({reason})", ()
    if not worst <= tolerance:
        return f"trees differ from plain sequences by {worst:.2g} nats a token", ()
    # Experts compute their tokens in groups, so other tokens move the rounding; dense layers don't.
    if _leak(scorer, pairs) > (tolerance if scorer.has_experts else 0.0):
        return "a token sees across branches", ()
    return "", tuple(scorer.asked)


def _random_pairs(model: PreTrainedModel) -> list[list[Tensor]]:
    """Two trees [prompt, chosen, rejected] of unequal lengths, from ids that no tokenizer makes
    special."""
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0]
    special = {getattr(model.config.get_text_config(), "pad_token_id", None)}
    usable = torch.tensor([i for i in range(min(rows, 1000)) if i not in special])

    def draw(length: int) -> Tensor:
        return usable[torch.randint(len(usable), (length,), generator=generator)]

    return [[draw(n) for n in lengths] for lengths in ((5, 4, 7), (3, 6, 2))]


def _plain(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Log-probs of `answer` after `prompt` by the model's own forward on one unpadded sequence."""
    ids = torch.cat([prompt, answer]).to(model.device)[None]
    logits = model(input_ids=ids, use_cache=False, **without_router_loss(model)).logits[0]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    states = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return states.gather(-1, answer.to(model.device)[:, None]).squeeze(-1)


def _rows(pairs: list[list[Tensor]], device: torch.device, trees: bool) -> tuple[Tensor, ...]:
    """All trees in one row, or one padded sequence a row: ids, positions, segments, targets of the
    scorer."""
    sequences = (
        [[(p, 0, 0), (a, 1, len(p)), (b, 2, len(p))] for p, a, b in pairs]
        if trees
        else [[(p, 0, 0), (x, 0, len(p))] for p, a, b in pairs for x in (a, b)]
    )
    length = sum(len(t) for s in sequences for t, _, _ in s) + 2
    if not trees:
        length = max(sum(len(t) for t, _, _ in s) for s in sequences) + 1
    count = 1 if trees else len(sequences)
    ids = torch.zeros(count, length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    segments = torch.full((count, length, 2), -1)
    targets: list[tuple[int, int]] = []
    at = 0
    for index, sequence in enumerate(sequences):
        row, at = (0, at) if trees else (index, 0)
        trunk_end = at + len(sequence[0][0]) - 1
        for part, (tokens, branch, start) in enumerate(sequence):
            here = slice(at, at + len(tokens))
            ids[row, here] = tokens
            positions[row, here] = torch.arange(start, start + len(tokens))
            segments[row, here] = torch.tensor([index, branch])
            if part:
                states = [trunk_end, *range(at, at + len(tokens) - 1)]
                targets += [(row * length + s, int(t)) for s, t in zip(states, tokens, strict=True)]
            at += len(tokens)
    packed = (ids, positions, segments, torch.tensor(targets).t())
    return tuple(tensor.to(device) for tensor in packed)


def _disagreement(scorer: TokenScorer, pairs: list[list[Tensor]], plain: list[Tensor]) -> float:
    """Largest difference of a token's log-prob between the scorer's rows and the plain forward."""
    rows = _rows(pairs, scorer.model.device, scorer.abilities.trees)
    return float((scorer(*rows).logprobs - torch.cat(plain)).abs().max())


def _leak(scorer: TokenScorer, pairs: list[list[Tensor]]) -> float:
    """How far another chosen answer in the first tree moves its rejected answer or the second
    tree, in nats.

    Same shapes, same kernels: without experts nothing may move by a single bit, in any dtype.
    """
    (prompt, chosen, rejected), other = pairs
    changed = [[prompt, chosen.roll(1), rejected], other]
    before, after = (
        scorer(*_rows(p, scorer.model.device, True)).logprobs[len(chosen) :]
        for p in (pairs, changed)
    )
    return float((before - after).abs().max())
