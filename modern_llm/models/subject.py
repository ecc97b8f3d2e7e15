"""One model under measurement: its results by plain sequences and as a `TokenScorer` runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modern_llm.config.printable import first_line
from modern_llm.models.attention.cpu_blocks import MERGE_BELOW
from modern_llm.models.attention.prefix_tree import TREE_ATTENTION, Call
from modern_llm.models.attention.sequence import SequenceGroup
from modern_llm.models.find_mixers import find_mixers
from modern_llm.models.logits import LastStates
from modern_llm.models.probe_rows import plain, plain_all, random_pairs, rows
from modern_llm.models.quantized import has_int8
from modern_llm.models.scorer import Capabilities, TokenScorer
from modern_llm.models.twin import one_thread

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
        self.sequence: SequenceGroup | None = None
        """The processes over which rows are split in the forwards that are compared."""
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
        if self.sequence is not None:  # each process has the gradient of its tokens
            found = {name: self.sequence.sum(grad) for name, grad in found.items()}
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
        self.shared = capabilities
        why = self.differs(capabilities)
        return f"the tree attention {why}" if why else ""

    def differs(self, capabilities: Capabilities) -> str:
        """Return how the results of a scorer with `capabilities` differ, or ""."""
        for merge_below in (0, MERGE_BELOW) if capabilities.trees else (0,):
            scorer = TokenScorer(self.model, capabilities, sequence=self.sequence)
            # The probe's short trees must test the code paths of long and of short trees.
            scorer.merge_below = merge_below
            inputs = rows(self.pairs, self.model.device, capabilities.trees)
            why = self._difference(lambda s=scorer, r=inputs: s(*r).logprobs)
            why = why or (self._leak(scorer) if capabilities.trees else "")
            if why:
                return why
        if capabilities.trees:
            self.windows = tuple(scorer.asked)
            if self.sequence is None:
                self.calls = scorer.asked.calls
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

    def mixers(self, capabilities: Capabilities) -> set[type]:
        """Return the classes of modules that the tree attention does not make exact, if any."""
        try:
            self.model.set_attn_implementation(TREE_ATTENTION)
            inputs = rows(self.pairs, self.model.device, True)
            scorer = TokenScorer(self.model, capabilities)
            scorer.narrows = False
            return find_mixers(
                self.model, self.pairs, inputs[2], lambda: scorer(*inputs), self.native
            )
        except Exception as error:  # the model's code may raise anything
            log.debug("%s: %s", type(self.model).__name__, error)
            return set()

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


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference of two gradients, relative to the norm of `expected`."""
    if not expected:
        return 0.0
    zero = torch.zeros(())
    off = sum(float((found.get(n, zero) - g).square().sum()) for n, g in expected.items())
    return (off / max(sum(float(g.square().sum()) for g in expected.values()), 1e-30)) ** 0.5
