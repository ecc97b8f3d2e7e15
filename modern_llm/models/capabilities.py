"""What we claim of a foreign model is measured at load: trees, padded rows, the fused head, lean
layers.

Two models are asked: the one that was loaded, in short rows, and its `twin`, a small one of the
same architecture in rows longer than all its windows and other special lengths, with gradients.
Both are asked by their own plain forward, one unpadded sequence at a time, and again as training
asks. A feature in which either disagrees is turned off, and the log says so in one line. Called
once by `make_scorer`, before the model is prepared for training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.config.errors import UserError
from modern_llm.config.printable import first_line
from modern_llm.models.attention.cpu_blocks import MERGE_BELOW
from modern_llm.models.attention.prefix_tree import (
    TREE_ATTENTION,
    Backend,
    backends,
    register_tree_attention,
)
from modern_llm.models.cpu.fused_ops import patch_cpu_ops, restore_ops
from modern_llm.models.cpu.last_layer import narrow_last_layer
from modern_llm.models.logits import LastStates, bounds_of, fuse
from modern_llm.models.modes import settle
from modern_llm.models.routers import without_router_loss
from modern_llm.models.scorer import Capabilities, TokenScorer
from modern_llm.models.twin import one_thread, twin_of

log = logging.getLogger(__name__)

# Largest difference of one token's log-prob between two orders of the same sums, by weight dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
# The twin's logits are some ten times as large as a model's, and so is their rounding.
TWIN_TOLERANCE = 1e-2
# Largest distance of the twin's gradient from that of its plain forward, as a share of its norm.
GRADIENT_TOLERANCE = 2e-3
# Tokens of [prompt, answer, answer] of two trees. Long ones exceed the twin's special lengths and
# the blocks of every backend.
SHORT = ((5, 4, 7), (3, 6, 2))
# Tokens of the row in which large logits are measured.
ROW = 12
LONG = ((70, 60, 75), (40, 50, 30))
# Every token of them is compared in rows with much padding: where a layer keeps its best keys, one
# token of a hundred shows that padding was among them.
UNEVEN = ((1, 130, 90), (1, 180, 240))


class Subject:
    """A model that is measured, and what its own plain forward gives.

    Args:
        model: set up by `probe` as it goes.
        sizes: of its trees.
        gradients: compare gradients too.
        tolerance: largest difference of a token's log-prob.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sizes: tuple[tuple[int, ...], ...],
        tolerance: float,
        *,
        gradients: bool = False,
    ):
        self.model, self.tolerance, self.gradients = model, tolerance, gradients
        self.native = model.config._attn_implementation
        self.pairs = _random_pairs(model, sizes)
        self._expected = self._measured(lambda: _plain_all(model, self.pairs))
        self.windows: tuple[int | None, ...] = ()
        (prompt, answer, _), _ = self.pairs
        self.last = LastStates(model, torch.cat([prompt, answer])[:ROW], tolerance)

    def _measured(self, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs of all answers, and the gradient of a weighted sum of them by parameter."""
        if not self.gradients:
            with torch.no_grad():
                return forward(), {}
        with torch.enable_grad(), one_thread():
            logprobs = forward()
            logprobs.mul(torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return logprobs.detach(), found

    def differs_plainly(self) -> str:
        """Say how the plain forward differs from what it gave at first, or ""."""
        return self._difference(lambda: _plain_all(self.model, self.pairs))

    def shares(self, capabilities: Capabilities) -> str:
        """Switch to the tree attention; say why the model does not do with it, or ""."""
        if self.gradients and capabilities.backend == "flex":
            # FlexAttention has a backward on a GPU only: the twin shows what is visible to whom.
            capabilities = replace(capabilities, backend="mask")
        try:
            self.model.set_attn_implementation(TREE_ATTENTION)
        except Exception as error:  # foreign code
            return f"the tree attention is refused ({first_line(error)})"
        if self.model.config._attn_implementation != TREE_ATTENTION:
            return "the architecture has an attention of its own"
        why = self.differs(capabilities)
        return f"the tree attention {why}" if why else ""

    def differs(self, capabilities: Capabilities) -> str:
        """Say how the answers of a scorer with `abilities` differ, or ""."""
        for merge_below in (0, MERGE_BELOW) if capabilities.trees else (0,):
            scorer = TokenScorer(self.model, capabilities)
            # The few tokens of the probe must take the way of long trees, and that of short ones.
            scorer.merge_below = merge_below
            rows = _rows(self.pairs, self.model.device, capabilities.trees)
            why = self._difference(lambda s=scorer, r=rows: s(*r).logprobs)
            why = why or (self._leak(scorer) if capabilities.trees else "")
            if why:
                return why
        if capabilities.trees:
            self.windows = tuple(scorer.asked)
        return ""

    def pads(self, capabilities: Capabilities) -> str:
        """Say how rows of several lengths in one forward differ, or ""."""
        why = self.differs(capabilities)
        if why or not self.gradients:  # the model itself may be too slow, or have fewer positions
            return why
        return Subject(self.model, UNEVEN, self.tolerance).differs(capabilities)

    def _difference(self, forward: Callable[[], Tensor]) -> str:
        try:
            logprobs, gradients = self._measured(forward)
        except Exception as error:  # foreign code: whatever it raises, it does not do
            return f"does not run in it ({first_line(error)})"
        expected, others = self._expected
        worst = float((logprobs - expected).abs().max())
        if not worst <= self.tolerance:
            return f"{self._where} by {worst:.2g} nats a token"
        off = _distance(gradients, others)
        if not off <= GRADIENT_TOLERANCE:
            return f"{self._where} by {off:.1%} of the gradient"
        return ""

    @property
    def _where(self) -> str:
        longest = max(prompt.numel() + max(a.numel(), b.numel()) for prompt, a, b in self.pairs)
        place = "of a small model of this architecture, " if self.gradients else ""
        return f"differs from plain sequences ({place}up to {longest} tokens)"

    @torch.no_grad()
    def _leak(self, scorer: TokenScorer) -> str:
        """Say whether another chosen answer in the first tree moves its rejected answer or the
        second tree.

        Same shapes, same kernels: without experts nothing may move by a single bit, in any dtype.
        Experts compute their tokens in groups, so other tokens move the rounding.
        """
        (prompt, chosen, rejected), other = self.pairs
        changed = [[prompt, chosen.roll(1), rejected], other]
        before, after = (
            scorer(*_rows(p, self.model.device, True)).logprobs[len(chosen) :]
            for p in (self.pairs, changed)
        )
        limit = self.tolerance if scorer.has_experts else 0.0
        return "lets a token see across branches" if (before - after).abs().max() > limit else ""

    @torch.no_grad()
    def looks_ahead(self) -> bool:
        """Whether a token's log-prob depends on a later token."""
        (prompt, answer, _), _ = self.pairs
        other = torch.cat([answer[:-1], prompt[:1] if prompt[0] != answer[-1] else prompt[1:2]])
        before, after = (_plain(self.model, prompt, a)[:-1] for a in (answer, other))
        return float((before - after).abs().max()) > self.tolerance


# The twin's gradients are measured, also where the caller is in inference mode.
@torch.inference_mode(False)
def probe(
    model: PreTrainedModel,
    *,
    trees: bool = True,
    tried: tuple[Backend, ...] | None = None,
    lean: bool = True,
    dropout: bool | None = None,
) -> Capabilities:
    """Measure what `model` does exactly and leave it set up to be asked that way.

    Args:
        trees: False skips the tree part: the user asked for separate rows.
        tried: backends of the tree attention, the first that is exact serves; by device unless
            said.
        lean: on a CPU, put the functions of `lean` into the model.
        dropout: whether the model trains with dropout; None where it is only asked.

    Side effects: the head becomes a `FusedHead` where that is exact, and the attention
    implementation the tree attention where that is.

    Raises:
        UserError: a token's log-prob depends on later tokens; that is no causal language model.
    """
    training = model.training
    model.eval()
    twin = twin_of(model)
    # On a GPU long rows cost nothing; without a twin they are the only evidence.
    long = twin is None or model.device.type == "cuda"
    modes = []
    if dropout is not None:
        asked = [(model, 2 * ROW, TOLERANCE[model.dtype])]
        asked += [] if twin is None else [(twin, sum(LONG[0][:2]), TWIN_TOLERANCE)]
        modes = settle(asked, dropout=dropout)
    subjects = [Subject(model, LONG if long else SHORT, TOLERANCE[model.dtype])]
    if subjects[0].looks_ahead():
        raise UserError(
            f"{type(model).__name__}: a token's log-prob depends on later tokens (an encoder, or a "
            "configuration without is_decoder: true); give a decoder"
        )
    if twin is not None:
        subjects.append(Subject(twin, LONG, TWIN_TOLERANCE, gradients=True))
    trial = _Trial(subjects)
    trial.notes += modes
    trial.patch_cpu_ops(lean and model.device.type == "cpu")
    trial.pad()
    trial.fuse()
    if trees:
        trial.share(tried or backends(model.device))
    model.train(training)
    for note in trial.notes:
        log.info("%s: %s", type(model).__name__, note)
    return replace(trial.capabilities, windows=subjects[0].windows, notes=tuple(trial.notes))


class _Trial:
    """Features tried one after the other on all subjects; what one refuses is off for all."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects
        self.capabilities = Capabilities(trees=False, fused=False)
        self.notes: list[str] = []
        self._patched = False

    def _why_not(self, ask: Callable[[Subject], str]) -> str:
        return next(filter(None, map(ask, self.subjects)), "")

    def patch_cpu_ops(self, wanted: bool) -> None:
        """Put the functions of `lean` into the layers."""
        if not wanted:
            return
        for subject in self.subjects:
            patch_cpu_ops(subject.model)
        why = self._why_not(Subject.differs_plainly)
        if why:
            self._restore_ops(f"their version for a CPU {why}")
            return
        self._patched = True
        for subject in self.subjects:
            narrow_last_layer(subject.model)

    def _restore_ops(self, reason: str) -> None:
        self._patched = False
        for subject in self.subjects:
            restore_ops(subject.model)
        self.notes.append(f"the model's own layers: {reason}")

    def pad(self) -> None:
        """Put rows of several lengths into one forward."""
        why = self._why_not(lambda subject: subject.pads(self.capabilities))
        if why:
            self.capabilities = replace(self.capabilities, padded=False)
            self.notes.append(f"one row at a time: a padded row {why}")

    def fuse(self) -> None:
        """Compute the head on target positions in chunks: of logits without a bound, else with
        the bound that is measured."""
        why = self._why_not_fused([None] * len(self.subjects))
        if why:
            bounds = bounds_of([subject.last for subject in self.subjects])
            if any(bounds):
                why = self._why_not_fused(bounds)
        if why:
            self.notes.append(f"plain logits: {why}")
        else:
            self.capabilities = replace(self.capabilities, fused=True)

    def _why_not_fused(self, bounds: list[float | None]) -> str:
        pairs = zip(self.subjects, bounds, strict=True)
        if not all([fuse(subject.model, bound) for subject, bound in pairs]):
            return "the head is not a linear layer"
        if not any(subject.last.can_grow for subject in self.subjects):
            return "what bounds the logits cannot be measured: they cannot be enlarged"
        fused = replace(self.capabilities, fused=True)
        why = self._why_not(lambda subject: subject.differs(fused))
        why = why or self._why_not(lambda subject: subject.last.differs(fused))
        return why and f"the fused head {why}"

    def share(self, tried: tuple[Backend, ...]) -> None:
        """Let answers share their prompt, by the first backend that is exact."""
        register_tree_attention()
        why = self._first_of(tried)
        if why and self._patched:
            kept = list(self.notes)
            self._restore_ops(f"with their version for a CPU {why}")
            why = self._first_of(tried)
            if why:  # it was not they: they come back
                self.notes = kept
                self.patch_cpu_ops(True)
        if why:
            self.notes.append(f"separate rows: {why}")

    def _first_of(self, tried: tuple[Backend, ...]) -> str:
        why = ""
        for backend in tried:
            capabilities = replace(self.capabilities, trees=True, padded=True, backend=backend)
            why = self._why_not(lambda subject, a=capabilities: subject.shares(a))
            if not why:
                self.capabilities = capabilities
                return ""
            log.debug("attention %s: %s", backend, why)
        for subject in self.subjects:
            subject.model.set_attn_implementation(subject.native)
        return why


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients as a share of the second's."""
    if not expected:
        return 0.0
    zero = torch.zeros(())
    off = sum(float((found.get(n, zero) - g).square().sum()) for n, g in expected.items())
    return (off / max(sum(float(g.square().sum()) for g in expected.values()), 1e-30)) ** 0.5


def _random_pairs(model: PreTrainedModel, sizes: tuple[tuple[int, ...], ...]) -> list[list[Tensor]]:
    """Two trees [prompt, chosen, rejected] of unequal lengths, from ids that no tokenizer makes
    special."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    rows = model.get_input_embeddings().weight.shape[0]
    rows = min(rows, getattr(config, "vocab_size", None) or rows, 1000)
    special = {getattr(config, "pad_token_id", None)}
    usable = torch.tensor([i for i in range(rows) if i not in special])

    def draw(length: int) -> Tensor:
        return usable[torch.randint(len(usable), (length,), generator=generator)]

    return [[draw(n) for n in lengths] for lengths in sizes]


def _plain_all(model: PreTrainedModel, pairs: list[list[Tensor]]) -> Tensor:
    """Log-probs of all answers one after the other."""
    parts = [_plain(model, prompt, answer) for prompt, *answers in pairs for answer in answers]
    return torch.cat(parts)


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
