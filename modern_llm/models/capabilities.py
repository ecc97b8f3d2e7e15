"""Capabilities of a model, measured at load: trees, padded rows, the fused head, fused CPU layers.

Two models are measured: the loaded one, in short rows, and its `twin`, a small one of the same
architecture in rows longer than all its windows and other special lengths, with gradients. Each is
run by its own plain forward, one unpadded sequence at a time, and again as training runs it. A
feature whose results differ on either model is turned off, and the log says so in one line.
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
from modern_llm.models.attention import agreement
from modern_llm.models.attention.cpu_blocks import MERGE_BELOW
from modern_llm.models.attention.prefix_tree import (
    TREE_ATTENTION,
    Backend,
    Call,
    backends,
    register_tree_attention,
)
from modern_llm.models.cpu.fused_ops import patch_cpu_ops, restore_ops
from modern_llm.models.cpu.last_layer import narrow_last_layer
from modern_llm.models.logits import LastStates, bounds_of, fuse
from modern_llm.models.modes import settle
from modern_llm.models.probe_rows import plain, plain_all, random_pairs, rows
from modern_llm.models.quantized import has_int8, product_dtype
from modern_llm.models.scorer import Capabilities, TokenScorer
from modern_llm.models.twin import one_thread, twin_of

log = logging.getLogger(__name__)

# Largest difference of a token's log-prob that comes from the order of sums, by the dtype of
# products.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
# The twin's logits, and so their rounding, are about ten times as large as a model's.
TWIN_TOLERANCE = 1e-2
# Largest difference of the twin's gradient from that of its plain forward, relative to its norm.
GRADIENT_TOLERANCE = 2e-3
# Tokens of [prompt, answer, answer] of two trees. The long ones exceed the twin's special lengths
# and the blocks of every backend.
SHORT = ((5, 4, 7), (3, 6, 2))
# Tokens of the row in which large logits are measured.
ROW = 12
LONG = ((70, 60, 75), (40, 50, 30))
# Trees for rows with much padding, in which every token is compared: a layer that keeps only its
# best keys may pick padding for one token of a hundred.
UNEVEN = ((1, 130, 90), (1, 180, 240))


class Subject:
    """A model under measurement, with the results of its own plain forward.

    Args:
        model: changed by `probe` step by step.
        sizes: tokens of its trees.
        tolerance: largest difference of a token's log-prob.
        gradients: compare gradients too.
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
        self.pairs = random_pairs(model, sizes)
        self._expected = self._measured(lambda: plain_all(model, self.pairs))
        self.windows: tuple[int | None, ...] = ()
        self.calls: set[Call] = set()
        (prompt, answer, _), _ = self.pairs
        self.last = LastStates(model, torch.cat([prompt, answer])[:ROW], tolerance)

    def _measured(self, forward: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return log-probs of all answers, and the gradients of a weighted sum of them."""
        if not self.gradients:
            with torch.no_grad():
                return forward(), {}
        with torch.enable_grad(), one_thread():
            logprobs = forward()
            weights = torch.linspace(-1, 1, len(logprobs), device=logprobs.device)
            logprobs.mul(weights).sum().backward()
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return logprobs.detach(), found

    def differs_plainly(self) -> str:
        """Return how the plain forward differs from its first results, or ""."""
        return self._difference(lambda: plain_all(self.model, self.pairs))

    def shares(self, capabilities: Capabilities, device: torch.device) -> str:
        """Switch to the tree attention; return why the model does not support it, or "".

        Args:
            device: of the run. Where the model is not on it, a dense mask is measured in
                place of the kernels, and `agreement` compares these.
        """
        elsewhere = self.model.device.type != device.type
        if capabilities.backend == "flex" and (
            elsewhere or self.gradients and device.type == "cpu"
        ):
            # On a CPU FlexAttention has no backward.
            capabilities = replace(capabilities, backend="mask")
        try:
            self.model.set_attn_implementation(TREE_ATTENTION)
        except Exception as error:  # the model's code may raise anything
            return f"the tree attention is refused ({first_line(error)})"
        if self.model.config._attn_implementation != TREE_ATTENTION:
            return "the architecture has an attention of its own"
        why = self.differs(capabilities)
        return f"the tree attention {why}" if why else ""

    def differs(self, capabilities: Capabilities) -> str:
        """Return how the results of a scorer with `capabilities` differ, or ""."""
        for merge_below in (0, MERGE_BELOW) if capabilities.trees else (0,):
            scorer = TokenScorer(self.model, capabilities)
            # The probe's short trees must test the code paths of long and of short trees.
            scorer.merge_below = merge_below
            inputs = rows(self.pairs, self.model.device, capabilities.trees)
            why = self._difference(lambda s=scorer, r=inputs: s(*r).logprobs)
            why = why or (self._leak(scorer) if capabilities.trees else "")
            if why:
                return why
        if capabilities.trees:
            self.windows, self.calls = tuple(scorer.asked), scorer.asked.calls
        return ""

    def pads(self, capabilities: Capabilities) -> str:
        """Return how the results of rows of several lengths in one forward differ, or ""."""
        why = self.differs(capabilities)
        if why or not self.gradients:  # long rows on the twin only: the model may be slow
            return why
        return Subject(self.model, UNEVEN, self.tolerance).differs(capabilities)

    def _difference(self, forward: Callable[[], Tensor]) -> str:
        try:
            logprobs, gradients = self._measured(forward)
        except Exception as error:  # any exception means unsupported
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
        """Return a message if another chosen answer in the first tree changes its rejected answer
        or the second tree, else "".

        Same shapes, same kernels: without experts no bit may change, in any dtype. Experts compute
        their tokens in groups, and layers of eight bits depend on the batch: there other tokens
        change the rounding.
        """
        (prompt, chosen, rejected), other = self.pairs
        changed = [[prompt, chosen.roll(1), rejected], other]
        before, after = (
            scorer(*rows(p, self.model.device, True)).logprobs[len(chosen) :]
            for p in (self.pairs, changed)
        )
        grouped = scorer.has_experts or has_int8(self.model)
        limit = self.tolerance if grouped else 0.0
        return "lets a token see across branches" if (before - after).abs().max() > limit else ""

    @torch.no_grad()
    def looks_ahead(self) -> bool:
        """Whether a token's log-prob depends on a later token."""
        (prompt, answer, _), _ = self.pairs
        other = torch.cat([answer[:-1], prompt[:1] if prompt[0] != answer[-1] else prompt[1:2]])
        before, after = (plain(self.model, prompt, a)[:-1] for a in (answer, other))
        return float((before - after).abs().max()) > self.tolerance


# Gradients of the twin are measured even if the caller is in inference mode.
@torch.inference_mode(False)
def probe(
    model: PreTrainedModel,
    *,
    trees: bool = True,
    tried: tuple[Backend, ...] | None = None,
    lean: bool = True,
    dropout: bool | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Capabilities:
    """Measure the capabilities of `model` and set it up to use them.

    Args:
        trees: False skips the measurement of trees: the user requested separate rows.
        tried: backends of the tree attention; the first exact one is used. Default: by device.
        lean: on a CPU, use the functions of `cpu.fused_ops`.
        dropout: whether the model trains with dropout; None if it is only scored.
        device, dtype: of the attention in the run; default: the model's. Sharded weights are probed
            on the host before, and the kernels of the attention on the device.

    Side effects: sets the fused head and the tree attention in `model` where they are exact.

    Raises:
        UserError: a token's log-prob depends on later tokens; that is no causal language model.
    """
    training = model.training
    model.eval()
    device, dtype = device or model.device, dtype or model.dtype
    twin = _on_device(twin_of(model), device)
    # Long rows of the model itself: on a GPU they are cheap, without a twin the only evidence.
    long = twin is None or model.device.type == "cuda"
    tolerance = TOLERANCE[product_dtype(model, model.dtype)]
    modes = []
    if dropout is not None:
        asked = [(model, 2 * ROW, tolerance)]
        asked += [] if twin is None else [(twin, sum(LONG[0][:2]), TWIN_TOLERANCE)]
        modes = settle(asked, dropout=dropout)
    subjects = [Subject(model, LONG if long else SHORT, tolerance)]
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
        trial.share(tried or backends(device), device, dtype)
    model.train(training)
    for note in trial.notes:
        if trial.refused and note.endswith(trial.refused):
            log.warning("warning: %s: %s", type(model).__name__, note)
        else:
            log.info("%s: %s", type(model).__name__, note)
    return replace(trial.capabilities, windows=subjects[0].windows, notes=tuple(trial.notes))


def _on_device(twin: PreTrainedModel | None, device: torch.device) -> PreTrainedModel | None:
    """Return the twin on a GPU, where FlexAttention has a backward; a CPU's twin stays."""
    return twin.to(device) if twin is not None and device.type == "cuda" else twin


class _Trial:
    """Trial of features on all subjects; a feature that fails on one is off for all."""

    def __init__(self, subjects: list[Subject]):
        self.subjects = subjects
        self.capabilities = Capabilities(trees=False, fused=False)
        self.notes: list[str] = []
        self.refused = ""
        """Why the fastest backend of the tree attention is not used."""
        self._patched = False

    def _why_not(self, ask: Callable[[Subject], str]) -> str:
        return next(filter(None, map(ask, self.subjects)), "")

    def patch_cpu_ops(self, wanted: bool) -> None:
        """Put the functions of `cpu.fused_ops` into the layers."""
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
        """Try rows of several lengths in one forward."""
        why = self._why_not(lambda subject: subject.pads(self.capabilities))
        if why:
            self.capabilities = replace(self.capabilities, padded=False)
            self.notes.append(f"one row at a time: a padded row {why}")

    def fuse(self) -> None:
        """Try the fused head without a bound of the logits, then with the measured bound."""
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
            return "the bound of the logits cannot be measured: they cannot be enlarged"
        fused = replace(self.capabilities, fused=True)
        why = self._why_not(lambda subject: subject.differs(fused))
        why = why or self._why_not(lambda subject: subject.last.differs(fused))
        return why and f"the fused head {why}"

    def share(self, tried: tuple[Backend, ...], device: torch.device, dtype: torch.dtype) -> None:
        """Try trees, in which answers share their prompt, with the first exact backend."""
        register_tree_attention()
        why = self._first_of(tried, device, dtype)
        if why and self._patched:
            kept = list(self.notes)
            self._restore_ops(f"with their version for a CPU {why}")
            why = self._first_of(tried, device, dtype)
            if why:  # the CPU functions are not the reason: use them again
                self.notes = kept
                self.patch_cpu_ops(True)
        if why:
            self.notes.append(f"separate rows: {why}")

    def _first_of(
        self, tried: tuple[Backend, ...], device: torch.device, dtype: torch.dtype
    ) -> str:
        why, self.refused = "", ""
        for backend in tried:
            capabilities = replace(self.capabilities, trees=True, padded=True, backend=backend)
            why = self._why_not(lambda subject, a=capabilities: subject.shares(a, device))
            if not why and backend == "flex" and device.type == "cuda":
                why = agreement.why_not(backend, self.subjects[0].calls, device, dtype)
            if not why:
                self.capabilities = capabilities
                if self.refused:
                    self.notes.append(f"attention {backend}, which is slower: {self.refused}")
                return ""
            self.refused = self.refused or f"{backend} is refused, because {why}"
        for subject in self.subjects:
            subject.model.set_attn_implementation(subject.native)
        return why


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients, relative to the norm of `expected`."""
    if not expected:
        return 0.0
    zero = torch.zeros(())
    off = sum(float((found.get(n, zero) - g).square().sum()) for n, g in expected.items())
    return (off / max(sum(float(g.square().sum()) for g in expected.values()), 1e-30)) ** 0.5
